"""The `data` section: where pictures and arrays come from, and what is done to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from trtune.configs.values import (
    FUNCTION,
    GREY,
    ChannelValues,
    Count,
    Natural,
    Real,
    Section,
    Size,
    key_error,
)

Source = Literal["auto", "images", "arrays", "idx", "python", "yolo", "coco", "npy"]
Resample = Literal[
    "pillow-bilinear", "pillow-bicubic", "opencv-bilinear", "opencv-bicubic", "opencv-area"
]
_OF_PICTURES = ("images", "yolo", "coco")
_SUFFIXES: Mapping[str, Source] = {
    ".npz": "arrays",
    ".npy": "arrays",
    ".json": "coco",
    ".yaml": "yolo",
    ".yml": "yolo",
    ".txt": "images",
}


def source_by_name(path: str) -> Source:
    """The source that the name of a path tells, or auto: then what lies there is looked at.

    >>> source_by_name("set/data.yaml"), source_by_name("loader:batches"), source_by_name("photos")
    ('yolo', 'python', 'auto')
    """
    if re.fullmatch(FUNCTION, path) and not re.match(r"[A-Za-z]:[\\/]", path):
        return "python"
    if re.search(r"idx\d-ubyte|\.idx(\.gz)?$", path):
        return "idx"
    return next((s for suffix, s in _SUFFIXES.items() if path.casefold().endswith(suffix)), "auto")


class Letterbox(Section):
    """The whole picture in a frame, its ratio kept, the rest filled."""

    size: Size = Field(description="a side in pixels, or [height, width]")
    color: Annotated[
        tuple[Annotated[int, Field(ge=0, le=255)], ...],
        BeforeValidator(lambda value: [value] if isinstance(value, int) else value),
        Field(json_schema_extra={"minItems": 1, "maxItems": 3}),
    ] = Field(default=GREY, description="of the frame, 0 to 255: one value, or three for RGB")
    place: Literal["center", "top_left"] = Field(
        default="center",
        description="center: as Ultralytics' LetterBox, sides rounded; top_left: as YOLOX' "
        "preproc, sides cut off",
    )
    stride: Count | None = Field(
        default=None, description="fill up only to the next multiple of this; null: to size"
    )
    upscale: bool = Field(default=True, description="enlarge pictures smaller than size")

    @model_validator(mode="after")
    def _consistent(self) -> Letterbox:
        if len(self.color) not in (1, 3):
            raise key_error("color", f"needs one value or three, found {len(self.color)}")
        return self


class Preprocess(Section):
    """From a decoded picture to a model input: resize and crop, or letterbox; scale, mean, std."""

    resize: Size | None = Field(
        default=None,
        description="short side in pixels, or [height, width]; by the filter `resample`",
    )
    crop: Size | None = Field(
        default=None, description="centre crop: a side in pixels, or [height, width]"
    )
    letterbox: Letterbox | None = Field(
        default=None, description="the whole picture in a frame, instead of resize and crop"
    )
    resample: Resample = Field(
        default="pillow-bilinear",
        description="whose resizing and which filter: Pillow's take all pixels in (antialias), "
        "OpenCV's bilinear the nearest (needs opencv-python-headless)",
    )
    scale: Real = Field(
        default=1 / 255, description="pixels (0 to 255) are multiplied by this before mean and std"
    )
    mean: ChannelValues = Field(
        default=(0.0,),
        description="subtracted after scale: one number a channel in `channels` order, or one",
    )
    std: ChannelValues = Field(
        default=(1.0,),
        description="divided by after mean: one number a channel in `channels` order, or one",
    )
    layout: Literal["NCHW", "NHWC"] = Field(
        default="NCHW", description="order of the axes of the input"
    )
    channels: Literal["RGB", "BGR", "GRAY"] = Field(
        default="RGB", description="order of the channels"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Preprocess:
        count = 1 if self.channels == "GRAY" else 3
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, count):
                raise key_error(
                    key,
                    f"{self.channels} needs {'one value' if count == 1 else '3 values, or one'}, "
                    f"found {len(values)}",
                )
        if any(value <= 0 for value in self.std):
            raise key_error("std", f"must be above 0, found {list(self.std)}")
        if "scale" not in self.model_fields_set and max(map(abs, self.mean)) > 1:
            raise key_error(
                "mean",
                f"{max(self.mean, key=abs):g} belongs to pixels from 0 to 255, but the default "
                "scale of 1/255 makes them 0 to 1; add `scale: 1`, or divide mean and std by 255",
            )
        if self.letterbox is not None and (self.resize is not None or self.crop is not None):
            raise key_error("letterbox", "takes the place of resize and crop; leave those out")
        self._check_crop()
        return self

    def _check_crop(self) -> None:
        if self.resize is None or self.crop is None:
            return
        crop = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        if isinstance(self.resize, int):
            fits = min(crop) <= self.resize
        else:
            fits = crop[0] <= self.resize[0] and crop[1] <= self.resize[1]
        if not fits:
            raise key_error(
                "crop", f"{_pixels(self.crop)} is larger than resize {_pixels(self.resize)}"
            )


def _pixels(size: int | tuple[int, int]) -> int | list[int]:
    return size if isinstance(size, int) else list(size)


class DataSet(Section):
    """Where pictures or arrays come from, which of them are used, and what is done to them."""

    source: Source = Field(
        default="auto",
        description="images: a folder, or a text file of FILE LABEL lines; yolo: data.yaml, or a "
        "folder with images and labels; coco: instances.json; npy: a folder of .npy files, one a "
        "sample; arrays: .npz or .npy; idx: idx or idx.gz; python: a function of yours that "
        "yields dicts of arrays. auto: what the path or the folder says",
    )
    path: str = Field(
        description="folder or file, relative to the config file; for python `module:function`, "
        "or `file.py:function` with the file relative to the config file",
        min_length=1,
    )
    labels: str | None = Field(
        default="auto",
        description="images: a CSV with the columns file,label, or a folder of PNG masks; arrays, "
        "npy and python: the name of an array; idx: a file. auto: folder names, boxes, or the "
        "array labels, label or y. null: no labels",
    )
    classes: str | tuple[str, ...] = Field(
        default=(),
        description="names of the classes in the model's order: a list, or a file with one a line "
        "(a synset first, say); for folders and CSVs that have names",
    )
    split: str | None = Field(
        default=None,
        description="which part of a data.yaml (yolo): train for calibration and val for "
        "evaluation, unless set",
    )
    images: str | None = Field(
        default=None, description="folder of the pictures of a coco file, if not beside it"
    )
    categories: Literal["order", "ids"] = Field(
        default="order",
        description="coco: how the model counts classes: from 0 in the order of the category ids, "
        "or by the ids themselves (detectors with 91 classes; where class 0 is the background and "
        "left out, with label_offset: -1)",
    )
    axis: Mapping[str, Natural] = Field(
        default={},
        description="model input -> axis that counts samples, where the shapes do not tell",
    )
    label_offset: int = Field(
        default=0, description="added to every label: 1 for a model with a background class first"
    )
    inputs: Mapping[str, str] = Field(
        default={}, description="model input -> name of the array (arrays and python)"
    )
    feed: Mapping[str, Any] = Field(
        default={},
        description="model input -> its values, the same for every sample, beside what the source "
        "feeds: {im_shape: [640, 640], scale_factor: 1}; a list is one sample's",
    )
    args: Mapping[str, Any] = Field(
        default={}, description="keyword arguments for the function (python)"
    )
    skip: Natural = Field(default=0, description="leave out the first N in sorted order")
    take: Count | None = Field(
        default=None, description="use the first N of what is left; null: all"
    )
    sample: Count | None = Field(
        default=None, description="use N of what is left, drawn with `seed`"
    )
    seed: Natural = Field(default=0, description="seed of `sample`")
    batch: Count = Field(
        default=8, description="samples a batch; a model with a fixed batch overrides it"
    )
    preprocess: Preprocess | None = Field(
        default=None,
        description="from picture to input; null: arrays go in as they are (images always get one)",
    )
    on_error: Literal["error", "skip"] = Field(
        default="error",
        description="a picture that cannot be read: stop with its name, or leave it out and count",
    )

    @model_validator(mode="before")
    @classmethod
    def _pictures_are_preprocessed(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        path = value.get("path")
        if value.get("source", "auto") == "auto" and isinstance(path, str):
            value = {**value, "source": source_by_name(path)}
        if value.get("source") in _OF_PICTURES and value.get("preprocess") is None:
            value = {**value, "preprocess": {}}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DataSet:
        if self.take is not None and self.sample is not None:
            raise key_error("sample", "give take or sample, not both")
        if self.source == "python" and not re.fullmatch(FUNCTION, self.path):
            raise key_error(
                "path",
                f"source python needs module:function or file.py:function, not {self.path!r}",
            )
        if self.source == "arrays" and not self.path.casefold().endswith((".npz", ".npy")):
            raise key_error("path", f"source arrays reads .npz and .npy files, not {self.path!r}")
        if self.args and self.source != "python":
            raise key_error("args", f"only source python takes args, not source {self.source}")
        if self.inputs and self.source in (*_OF_PICTURES, "idx"):
            raise key_error(
                "inputs", f"source {self.source} has no named arrays; it feeds the only input"
            )
        return self


_ALWAYS_INHERITED = ("batch", "preprocess", "label_offset", "on_error", "axis", "classes", "feed")
_INHERITED_WITH_SOURCE = ("path", "inputs", "images")


def _source(section: Mapping[str, Any], default: Any = "auto") -> Any:
    """The source of a section as written: said, or told by the path's name."""
    said, path = section.get("source", "auto"), section.get("path")
    if said != "auto":
        return said
    told = source_by_name(path) if isinstance(path, str) else "auto"
    return default if told == "auto" and "source" not in section else told


def inherit(section: Mapping[str, Any], calibration: Mapping[str, Any]) -> dict[str, Any]:
    """A `section` (evaluation, validation) with the keys it leaves out taken from `calibration`.

    Never take, skip, sample and seed: they say which pictures. What belongs to one source or one
    path is not carried to another: labels of pictures and idx (a file) and args of a function
    stay behind when `path` differs, all but batch, preprocess, label_offset, on_error, axis,
    classes and feed when `source` does.
    """
    keys = list(_ALWAYS_INHERITED)
    source = _source(calibration)
    if _source(section, source) == source:
        keys += ["source", *_INHERITED_WITH_SOURCE]
        same_path = section.get("path", calibration.get("path")) == calibration.get("path")
        if same_path or source in ("arrays", "python"):
            keys.append("labels")
        if same_path:
            keys.append("args")
    merged = {**{key: calibration[key] for key in keys if key in calibration}, **section}
    theirs, ours = calibration.get("preprocess"), section.get("preprocess")
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        merged["preprocess"] = {**theirs, **ours}
    return merged


def _split(value: dict[str, Any]) -> dict[str, Any]:
    """Of a data.yaml, train for calibration and validation, and val for evaluation, where `split`
    is not said."""
    calibration, evaluation = value["calibration"], value.get("evaluation")
    if not isinstance(calibration, dict) or _source(calibration) != "yolo":
        return value
    if not str(calibration.get("path", "")).casefold().endswith((".yaml", ".yml")):
        return value
    if isinstance(evaluation, dict) and "path" not in evaluation:
        evaluation = {"split": "val", **evaluation}
    if evaluation is None and "split" not in calibration:
        evaluation = {"split": "val"}
    calibration = {"split": "train", **calibration}
    value = {**value, "calibration": calibration, "evaluation": evaluation}
    validation = value.get("validation")
    if isinstance(validation, dict) and "path" not in validation:
        value["validation"] = {"split": calibration["split"], **validation}
    return value


class Data(Section):
    """The pictures: those that set the scales, those that measure the result, and, if others are
    to choose pins, those."""

    calibration: DataSet = Field(description="what the scales come from")
    evaluation: DataSet = Field(
        description="what accuracy is measured on; keys left out (but take, skip, sample, seed) "
        "come from calibration; without this section, the calibration pictures themselves"
    )
    validation: DataSet | None = Field(
        default=None,
        description="what the tuner chooses pins on, so that the values that are reported, those "
        "on evaluation, are of pictures that chose nothing; keys left out come from calibration as "
        "for evaluation; null: pins are chosen on evaluation",
    )

    @property
    def sections(self) -> dict[str, DataSet]:
        """Every section there is, by its name."""
        found = {"calibration": self.calibration, "evaluation": self.evaluation}
        return found if self.validation is None else {**found, "validation": self.validation}

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "calibration" not in value:
            return value
        value = _split(value)
        calibration = value["calibration"]
        if value.get("evaluation") is None:
            value = {**value, "evaluation": calibration}
        if isinstance(calibration, DataSet):
            calibration = calibration.model_dump(exclude_unset=True)
        if not isinstance(calibration, dict):
            return value
        others = {
            name: inherit(section, calibration)
            for name in ("evaluation", "validation")
            if isinstance(section := value.get(name), dict) and section is not calibration
        }
        return {**value, **others}
