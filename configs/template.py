"""A first config for a model, with everything that its inputs tell filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import MappingProxyType

from trtune.configs.yamltree import inline_yaml

DATA_PATH = "PATH/TO/YOUR/DATA"
SCHEMA_FILE = "trtune.schema.json"
"""Beside a config: what editors check and complete it by."""
ModelInput = tuple[str, Sequence[int | str | None], str]

_BATCH = (1, 8, 32)
_SIDE = (224, 224, 224)
_LENGTH = (1, 128, 512)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


_PICTURE_SOURCES = ("images", "yolo", "coco")


@dataclass(frozen=True, slots=True)
class Hints:
    """What `init` may know beside the inputs.

    metric, agreement: the task's measure with and without labels; decoder: a detector's;
    source: what the data is; split: it is a data.yaml with its own parts; labelled: it has labels;
    take: how many samples calibrate, the others measure; preprocess: keys that were tried best,
    `tried` the figures in words. path: the file or folder itself; pictures: how many there are;
    counting: keys that say how a COCO file's classes are counted; constants: inputs that decide on
    branches, a value each has.
    """

    metric: str | None = None
    agreement: str | None = None
    decoder: str | None = None
    source: str = "images"
    split: bool = False
    labelled: bool = False
    take: int | None = None
    preprocess: Mapping[str, object] | None = None
    tried: tuple[str, ...] = ()
    path: Path | None = None
    pictures: int | None = None
    counting: Mapping[str, object] = field(default_factory=dict)
    constants: Mapping[str, bool | int | float | None] = field(
        default_factory=lambda: MappingProxyType({})
    )

    def sentences(self) -> list[str]:
        """What was found, for people."""
        task = f"a model for {self.metric}" if self.metric else "no known kind of model"
        lines = [f"{task}, decoder {self.decoder}" if self.decoder else task]
        if self.pictures is not None:
            measured = "(train), those of val measure" if self.split else "and the others measure"
            lines.append(
                f"{self.source}: {self.pictures} pictures; {self.take} calibrate {measured}"
                f"{'' if self.labelled else '; no labels that say how well FP32 does'}"
            )
        if self.tried:
            lines.append(f"best of the usual preprocessings on FP32: {self.tried[0]}")
        if self.counting:
            lines.append("classes are the ids of COCO's categories, by the figures too")
        return lines


@dataclass(frozen=True, slots=True)
class _Picture:
    layout: str
    channels: int
    height: int | None
    width: int | None


def init_text(
    model_path: str | PurePath,
    inputs: Sequence[ModelInput],
    *,
    data_path: str = DATA_PATH,
    name: str | None = None,
    default: str = "int8",
    hints: Hints | None = None,
) -> str:
    """A commented config for the model at `model_path`, as text.

    `model_path` and `data_path` are written as given, so they are relative to where the text will
    be saved. `inputs` are `(name, shape, numpy dtype name)`; a str or None in a shape is a free
    dimension. One float or uint8 input of 1 or 3 channels, alone or beside a few numbers a sample
    (the picture's size, say), reads pictures, anything else arrays.
    `load_config` accepts the text once `data_path` is there. `default` is that of `precision`: qat
    for a model that is quantized already. `hints` are what else is known of model and data.
    """
    hints = hints or Hints()
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", PurePath(model_path).stem).strip("-._") or "model"
    pictured, beside = _beside(inputs)
    picture = None if pictured is None else _as_picture(pictured)
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "# What each key means: trtune schema, or an editor that reads the file named above.",
        "version: 1",
        f"name: {inline_yaml(name or f'{stem[:90]}-int8')}",
        "# extends: presets/imagenet.yaml     # other configs, or presets; what stands here wins",
        "",
        "model:",
        f"  path: {inline_yaml(str(model_path))}     # seen from this file; ${{VAR}} is filled in",
        *_input_comments(inputs),
        *_shape_lines(inputs),
        *_constant_lines(hints),
        "",
        "data:",
        "  calibration:                     # what the scales come from: 100 to 500 samples",
        *(
            _picture_lines(data_path, hints)
            if picture and hints.source in _PICTURE_SOURCES
            else _array_lines(inputs, data_path)
        ),
        *_share_lines(hints, known=picture is not None),
        f"    batch: {_batch(inputs)}",
        *(_feed_lines(picture, beside) if picture and hints.source in _PICTURE_SOURCES else ()),
        *(_preprocessing(picture, pictured[2], hints) if picture and pictured else ()),
        *_evaluation_lines(hints, known=picture is not None),
        *_SETTINGS,
    ]
    text = "\n".join(lines).replace(_DEFAULT, f"  default: {default:<24}", 1) + "\n"
    return text.replace(_TARGETS, "\n".join(_target_lines(hints)), 1)


def _constant_lines(hints: Hints) -> list[str]:
    """Commented out: whether an input has one value in use is for the user to say."""
    if not hints.constants:
        return []
    values = {name: "VALUE" if v is None else v for name, v in hints.constants.items()}
    return [
        f"  # constants: {inline_yaml(values)}",
        "  #   # what these inputs ask for lies in branches, of which one is quantized that way:",
        "  #   # the engine then has no such input, and the data needs none",
    ]


def _share_lines(hints: Hints, *, known: bool) -> list[str]:
    comment = "# the first N in sorted order; or sample: N, seed: 0"
    if hints.take is None and not known:
        return [f"    # take: 256                    {comment}"]
    taken = f"    take: {hints.take or 256}"
    return [f"{taken:<35}{comment}"]


def _evaluation_lines(hints: Hints, *, known: bool) -> list[str]:
    comment = "# what accuracy is measured on: other samples than calibrate"
    if hints.take is None and not known:
        return [f"  # evaluation: {{skip: 256}}        {comment}"]
    if hints.split:
        return [f"  evaluation: {{split: val}}         {comment}"]
    line = f"  evaluation: {{skip: {hints.take or 256}}}"
    return [f"{line:<35}{comment}"]


def _target_lines(hints: Hints) -> list[str]:
    """The target: the task's own measure where the data has labels, else closeness."""
    own = hints.metric or "top1"
    drop = "0.2" if own == "perplexity" else "0.01" if hints.metric else "0.005"
    measured = f"{{metric: {own}, max_drop: {drop}}}"
    alike = f"{{metric: {hints.agreement}, min: 0.95}}" if hints.agreement else ""
    if hints.labelled:
        first, others = measured, ["{metric: sqnr_db, min: 20}", alike]
    else:
        first, others = "{metric: sqnr_db, min: 20}", [alike, measured]
    note = "" if hints.labelled else "     # output against FP32; needs no labels"
    return [f"  target: {first}{note}", *(f"  # target: {other}" for other in others if other)]


def _preprocessing(picture: _Picture, dtype: str, hints: Hints) -> list[str]:
    """`preprocess` as tried, as the kind of detector wants it, or as a classifier's guess."""
    size = (picture.height, picture.width)
    keys = hints.preprocess or _detector_keys(hints.decoder, size, picture)
    if keys is None:
        return _preprocess_lines(picture, dtype)
    tried = [f"      # tried on FP32: {line}" for line in hints.tried]
    guess = "" if hints.tried else "                    # a guess: check how the model was trained"
    lines = [f"    preprocess:{guess}", *tried]
    return [*lines, *(f"      {key}: {inline_yaml(value)}" for key, value in keys.items())]


def _detector_keys(
    decoder: str | None, size: tuple[int | None, int | None], picture: _Picture
) -> dict[str, object] | None:
    height, width = size
    if decoder is None or height is None or width is None or picture.channels != 3:
        return None
    side: object = height if height == width else [height, width]
    common: dict[str, object] = {"layout": picture.layout}
    if decoder == "yolox":
        box = {"size": side, "place": "top_left"}
        return {"letterbox": box, "scale": 1, **common, "channels": "BGR"}
    if decoder in ("ssd", "detr"):
        keys: dict[str, object] = {"resize": [height, width], "scale": 1 / 255}
        if decoder == "detr":
            keys |= {"mean": list(_IMAGENET_MEAN), "std": list(_IMAGENET_STD)}
        return {**keys, **common, "channels": "RGB"}
    return {"letterbox": {"size": side}, "scale": 1 / 255, **common, "channels": "RGB"}


_DEFAULT = "  default: int8                    "


_TARGETS = "  # the target"
_SETTINGS = (
    "",
    "calibration:",
    "  method: auto                     # or entropy, entropy-s7310, percentile, mse, max",
    "  # cache: calibration.cache       # read this TensorRT cache instead of calibrating",
    "",
    "precision:",
    f"{_DEFAULT}# int8, fp8, fp16, bf16, fp32, qat (Q/DQ in the model)",
    "  fallback: fp32                   # what is not int8: fp32, fp16, bf16",
    '  # pin: {"conv_2": fp32, "op:Softmax": fp32, "re:.*/se/.*": fp16}',
    "  # ladder: [int8, fp8, fp16, fp32]        # fp8 first for what int8 hurts: no speed lost",
    _TARGETS,
    "  max_pins: 16                     # most nodes that tuning may take out of int8",
    "",
    "backends:                          # each gives one engine",
    "  - {name: onnxruntime, lowering: emulate}     # TensorRT's arithmetic on this CPU",
    "  # - {name: onnxruntime, lowering: deploy}    # fast on this CPU",
    '  # - {name: tensorrt_rtx, compute_capabilities: ["8.9"]}',
    "  # - {name: tensorrt, workspace: 4GiB, timing_cache: timing.cache}",
    "",
    "report: {formats: [md, html, csv, json], latency: {warmup: 10, runs: 50}}",
)


def _beside(inputs: Sequence[ModelInput]) -> tuple[ModelInput | None, Sequence[ModelInput]]:
    """The one input that takes pictures, and the others; None if these are not a few numbers."""
    pictured = [given for given in inputs if _as_picture(given)]
    others = [given for given in inputs if given not in pictured]
    if len(pictured) != 1 or any(_numbers_a_sample(shape) is None for _, shape, _ in others):
        return None, ()
    return pictured[0], others


def _numbers_a_sample(shape: Sequence[int | str | None]) -> int | None:
    """How many numbers a sample has in an input N, or N x 1 to 4, or None for another shape."""
    if len(shape) == 1 and (not isinstance(shape[0], int) or shape[0] <= 1):
        return 1
    last = shape[-1] if len(shape) == 2 else None
    return last if isinstance(last, int) and 1 <= last <= 4 else None


def _feed_lines(picture: _Picture, beside: Sequence[ModelInput]) -> list[str]:
    """`feed` for what goes beside a picture: its size where the name says so, else ones."""
    if not beside:
        return []
    size = [picture.height or _SIDE[1], picture.width or _SIDE[1]]
    values = {
        name: size if _numbers_a_sample(shape) == 2 and re.search("shape|size", name) else 1
        for name, shape, _ in beside
    }
    return [
        "    feed:                          # the same for every picture; a guess, check it",
        *(f"      {inline_yaml(name)}: {inline_yaml(value)}" for name, value in values.items()),
    ]


def _as_picture(given: ModelInput) -> _Picture | None:
    _, shape, dtype = given
    if len(shape) != 4 or dtype not in ("float32", "float16", "uint8"):
        return None
    for layout, channel, sides in (("NCHW", 1, (2, 3)), ("NHWC", 3, (1, 2))):
        channels = shape[channel]
        if isinstance(channels, int) and channels in (1, 3):
            height, width = (
                side if isinstance(side, int) else None for side in map(shape.__getitem__, sides)
            )
            return _Picture(layout, channels, height, width)
    return None


def _input_comments(inputs: Sequence[ModelInput]) -> list[str]:
    if not inputs:
        return []
    described = [
        f"  #   {inline_yaml(name)}: {dtype} "
        + inline_yaml(["?" if dim is None else dim for dim in shape])
        for name, shape, dtype in inputs
    ]
    return ["  # inputs:", *described]


def _shape_lines(inputs: Sequence[ModelInput]) -> list[str]:
    ranges: dict[str, tuple[int, int, int]] = {}
    lines = []
    for name, shape, dtype in inputs:
        if all(isinstance(dim, int) and dim > 0 for dim in shape):
            continue
        picture = _as_picture((name, shape, dtype)) is not None
        dims = [_range(axis, dim, picture, ranges) for axis, dim in enumerate(shape)]
        low, mid, high = (list(column) for column in zip(*dims, strict=True))
        lines.append(f"    {inline_yaml(name)}: {{min: {low}, opt: {mid}, max: {high}}}")
    return (
        ["  shapes:                          # free dimensions: smallest, usual, largest", *lines]
        if lines
        else []
    )


def _range(
    axis: int, dim: int | str | None, picture: bool, ranges: dict[str, tuple[int, int, int]]
) -> tuple[int, int, int]:
    """min, opt, max of one dimension; the same name means the same everywhere."""
    if isinstance(dim, int) and dim > 0:
        return dim, dim, dim
    guess = _BATCH if axis == 0 else _SIDE if picture else _LENGTH
    return ranges.setdefault(dim, guess) if isinstance(dim, str) and dim else guess


def _batch(inputs: Sequence[ModelInput]) -> int:
    first = [shape[0] for _, shape, _ in inputs if shape]
    fixed = [dim for dim in first if isinstance(dim, int) and dim > 0]
    return fixed[0] if fixed else _BATCH[1]


def _picture_lines(data_path: str, hints: Hints) -> list[str]:
    boxes = hints.decoder is not None
    source = "yolo" if boxes and hints.source == "images" else hints.source
    path = f"    path: {inline_yaml(data_path)}     "
    if boxes:
        where = "# data.yaml, or a folder with images and labels"
        kinds = "# yolo, coco, images (no boxes), arrays, npy, python"
        counting = [f"    {key}: {value}" for key, value in hints.counting.items()]
        return [f"    source: {source:<23}{kinds}", path + where, *counting]
    return [
        f"    source: {source:<23}# images, yolo, coco, arrays (.npz/.npy), npy, idx, python",
        path + "# a folder of pictures",
        "    # labels: labels.csv           # columns file,label; without it, the folders' names",
    ]


def _array_lines(inputs: Sequence[ModelInput], data_path: str) -> list[str]:
    named: Mapping[str, str] = {name: name for name, _, _ in inputs}
    path = data_path if data_path.casefold().endswith((".npz", ".npy")) else f"{data_path}.npz"
    lines = [
        "    source: arrays                 # images, arrays (.npz/.npy), idx, python",
        f"    path: {inline_yaml(path)}     # one array an input, one row a sample",
    ]
    if len(inputs) > 1:
        lines.append(f"    inputs: {inline_yaml(named)}     # model input: array in the file")
    lines.append("    # labels: labels               # the array of class indices; or null")
    return lines


def _preprocess_lines(picture: _Picture, dtype: str) -> list[str]:
    lines = ["    preprocess:                    # a guess: check how the model was trained"]
    if picture.height and picture.width:
        short = min(picture.height, picture.width)
        if short < 64:
            lines.append(f"      resize: {[picture.height, picture.width]}")
        else:
            resize = round(short * 256 / 224)
            square = picture.height == picture.width
            crop = short if square else [picture.height, picture.width]
            lines += [
                f"      resize: {resize}                  # short side",
                f"      crop: {crop}",
            ]
    else:
        lines += [
            f"      resize: {_SIDE[1] * 256 // 224}                  # short side",
            f"      crop: {_SIDE[1]}",
        ]
    if dtype == "uint8":
        lines.append("      scale: 1                     # pixels stay 0 to 255")
    else:
        lines.append(f"      scale: {1 / 255}   # pixels 0 to 255 become 0 to 1")
        large = not picture.height or picture.height >= 64
        if picture.channels == 3 and large:
            lines.append(f"      mean: {list(_IMAGENET_MEAN)}   # ImageNet")
            lines.append(f"      std: {list(_IMAGENET_STD)}")
        else:
            lines += [
                f"      mean: {[0.0] * picture.channels}",
                f"      std: {[1.0] * picture.channels}",
            ]
    channels = "GRAY" if picture.channels == 1 else "RGB"
    return [*lines, f"      layout: {picture.layout}", f"      channels: {channels}"]
