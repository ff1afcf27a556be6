"""For DeepStream: a configuration of Gst-nvinfer, with the cache, the pins and the labels.

Option names are those of `gstnvinfer_property_parser.h`. What nvinfer computes of a pixel is
`net-scale-factor * (pixel - offset)`, with one factor for all channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trtune.configs.files import write_text
from trtune.configs.sources import Preprocess
from trtune.export.bundle import Bundle, implicit_plan
from trtune.export.files import (
    CACHE_NAME,
    FP32_FILE,
    DeviceStep,
    Export,
    cache_notes,
    write_cache,
    write_fp32,
)

CONFIG_FILE, LABELS_FILE = "config_infer.txt", "labels.txt"
DETECTOR, CLASSIFIER, SEGMENTER, OTHER = 0, 1, 2, 100
NETWORK_TYPES = {"top1": CLASSIFIER, "top5": CLASSIFIER, "miou": SEGMENTER}
"""Metric of the target -> nvinfer's network-type. Detectors need a parser of their own boxes, so
they are handed on as raw tensors."""
MODES = {"int8": 1, "fp16": 2}
COLORS = {"RGB": 0, "BGR": 1, "GRAY": 2}
LARGEST_FACTOR_ERROR = 1e-3


def write_deepstream(bundle: Bundle, folder: Path) -> Export:
    """Write the FP32 model, the cache, the configuration and the labels where they are known."""
    write_fp32(bundle, folder / FP32_FILE)
    files = [FP32_FILE, CONFIG_FILE]
    if write_cache(bundle, folder / CACHE_NAME):
        files.append(CACHE_NAME)
    labels = class_names(bundle)
    kind = network_type(bundle)
    if labels:
        joined = ";".join(labels) if kind == CLASSIFIER else "\n".join(labels)
        write_text(folder / LABELS_FILE, joined + "\n")
        files.append(LABELS_FILE)
    properties, notes = infer_properties(bundle, labels=labels)
    lines = [f"# {key}: {value}" for key, value in bundle.metadata.items()]
    lines += ["[property]", *(f"{key}={value}" for key, value in properties.items())]
    write_text(folder / CONFIG_FILE, "\n".join(lines) + "\n")
    steps = (
        DeviceStep(
            "Build the engine and run it on a video (FILE.h264)",
            "gst-launch-1.0 filesrc location=FILE.h264 ! h264parse ! nvv4l2decoder ! m.sink_0 "
            f"nvstreammux name=m batch-size={properties['batch-size']} width=1280 height=720 ! "
            f"nvinfer config-file-path={CONFIG_FILE} ! fakesink",
        ),
    )
    notes += [
        "nvinfer builds from the FP32 model, the cache and the pins, as TensorRT up to 10 does. "
        "TensorRT 11 has no calibrators: build the engine with the trtexec export and name it in "
        "model-engine-file instead.",
        *cache_notes(bundle),
    ]
    return Export("deepstream", folder, tuple(files), steps, tuple(notes))


def network_type(bundle: Bundle) -> int:
    """What nvinfer is to make of the outputs."""
    return NETWORK_TYPES.get(bundle.record.baseline.metric, OTHER)


def class_names(bundle: Bundle) -> tuple[str, ...]:
    """The names of the classes, where the config has them; nothing else knows their order."""
    classes = bundle.config.data.evaluation.classes
    if not isinstance(classes, str):
        return tuple(classes)
    try:
        lines = Path(classes).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ()
    return tuple(line.strip() for line in lines if line.strip())


def infer_properties(bundle: Bundle, *, labels: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The section `property` of the configuration, and what could not be said in it."""
    precisions = {
        implicit_plan(bundle.plan).precision(n) for n in implicit_plan(bundle.plan).compute_nodes
    }
    mode = next((MODES[p] for p in MODES if p in precisions), 0)
    found = {
        "gpu-id": "0",
        "gie-unique-id": "1",
        "onnx-file": FP32_FILE,
        "model-engine-file": "engine.plan",
        "network-mode": str(mode),
        "batch-size": str(_batch(bundle)),
        "network-type": str(network_type(bundle)),
        "output-blob-names": ";".join(spec.name for spec in bundle.model.outputs),
    }
    notes: list[str] = []
    if bundle.cache is not None:
        found["int8-calib-file"] = CACHE_NAME
    if labels:
        found["labelfile-path"] = LABELS_FILE
    else:
        notes.append("No labels: the config names no classes (data.evaluation.classes).")
    if network_type(bundle) == OTHER:
        found["output-tensor-meta"] = "1"
        notes.append(
            "The outputs are handed on as tensors (network-type 100): what they mean is for a "
            "parser of yours to say (parse-bbox-func-name and custom-lib-path for boxes)."
        )
    if bundle.constrained:
        pins = (f"{name}:{precision}:gpu" for name, precision in bundle.constrained.items())
        found["layer-device-precision"] = ";".join(pins)
    if bundle.settings.dla_core is not None:
        found |= {"enable-dla": "1", "use-dla-core": str(bundle.settings.dla_core)}
    pictures, said = _pictures(bundle)
    return found | pictures, notes + said


def _batch(bundle: Bundle) -> int:
    spec = bundle.model.inputs[0]
    profile = bundle.profiles.get(spec.name)
    first = profile.opt[0] if profile else spec.shape[0] if spec.shape else 1
    return first if isinstance(first, int) else 1


def _pictures(bundle: Bundle) -> tuple[dict[str, str], list[str]]:
    """What is to be done to pictures, and what nvinfer does otherwise than this run did."""
    preprocess, spec = bundle.config.data.evaluation.preprocess, bundle.model.inputs[0]
    if preprocess is None or len(spec.shape) != 4:
        return {}, [
            "The config has no `preprocess`: net-scale-factor, offsets and model-color-format are "
            "not set, and nvinfer's defaults (pixels as they are, RGB) apply."
        ]
    profile = bundle.profiles.get(spec.name)
    sizes = [
        size if isinstance(size, int) else profile.opt[axis] if profile else 0
        for axis, size in enumerate(spec.shape)
    ][1:]
    factor, offsets, notes = normalisation(preprocess)
    found = {
        "net-scale-factor": f"{factor:.9g}",
        "offsets": ";".join(f"{offset:.9g}" for offset in offsets),
        "model-color-format": str(COLORS[preprocess.channels]),
        "network-input-order": "1" if preprocess.layout == "NHWC" else "0",
        "infer-dims": ";".join(map(str, sizes)),
    }
    if preprocess.letterbox is not None:
        centred = preprocess.letterbox.place == "center"
        found |= {"maintain-aspect-ratio": "1", "symmetric-padding": "1" if centred else "0"}
        notes.append(
            f"nvinfer fills the frame with black; this run filled it with "
            f"{list(preprocess.letterbox.color)}."
        )
    elif preprocess.crop is not None:
        notes.append("nvinfer scales the whole frame to the input; this run cut the middle out.")
    return found, notes


def normalisation(section: Preprocess) -> tuple[float, list[float], list[str]]:
    """net-scale-factor, offsets, and a note where one factor cannot say it.

    (scale * x - mean) / std is (scale / std) * (x - mean / scale).
    """
    count = 1 if section.channels == "GRAY" else 3
    means, stds = (list(v) * (count if len(v) == 1 else 1) for v in (section.mean, section.std))
    factor = section.scale * sum(1 / std for std in stds) / count
    offsets = [mean / section.scale for mean in means]
    off = max(abs(factor * std / section.scale - 1) for std in stds)
    if off <= LARGEST_FACTOR_ERROR:
        return factor, offsets, []
    note = (
        "nvinfer has one net-scale-factor for all channels, and this run divided by "
        f"{stds}: with their mean some channel is off by {100 * off:.1f} %. Measure with that "
        "(equal std in the config) before you rely on it, or use Gst-nvdspreprocess."
    )
    return factor, offsets, [note]
