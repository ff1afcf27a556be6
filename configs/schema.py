"""The config language: what each key means, what it may hold, and its default.

Values only: reading files, variables, and relative paths are the job of `load`. Every value here
is frozen; paths are absolute once a config came through `load_config`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from trtune.configs.runtimes import Backend, OnnxRuntime, TensorRT, TensorRTRTX
from trtune.configs.sources import Data, DataSet, Preprocess
from trtune.configs.values import (
    FUNCTION,
    HELD_OUT,
    PERCENTILE,
    Bytes,
    Count,
    Natural,
    Real,
    Section,
    key_error,
)

__all__ = [
    "Backend",
    "Calibration",
    "Compare",
    "Config",
    "Data",
    "DataSet",
    "Latency",
    "Model",
    "OnnxRuntime",
    "Precision",
    "Preprocess",
    "Report",
    "Shape",
    "Target",
    "TensorRT",
    "TensorRTRTX",
]

LABELLED_METRICS = ("top1", "top5", "ap", "ap50", "miou")
AGREEMENTS = ("agreement", "detection_agreement", "pixel_agreement", "token_agreement")
UNLABELLED_METRICS = ("sqnr_db", "cosine", *AGREEMENTS)
OWN_METRICS = ("next_token", "perplexity")
KNOWN_METRICS = (*LABELLED_METRICS, *UNLABELLED_METRICS, *OWN_METRICS)

PrepareMove = Literal["scale", "shift", "round", "bias"]
Method = Literal["entropy", "entropy-s7310", "percentile", "mse", "max", "auto"]
PrecisionName = Literal["int8", "fp8", "fp16", "bf16", "fp32"]
LADDER = ("int8", "fp8", "bf16", "fp16", "fp32")
"""From fast to exact."""
Default = Literal["int8", "fp8", "fp16", "bf16", "fp32", "qat"]
ReportFormat = Literal["md", "html", "csv", "json"]


class Shape(Section):
    """The range of shapes of one dynamic input."""

    min: tuple[Count, ...] = Field(description="smallest shape that will be used")
    opt: tuple[Count, ...] = Field(description="shape that the engine is optimized for")
    max: tuple[Count, ...] = Field(description="largest shape that will be used")

    @model_validator(mode="after")
    def _ordered(self) -> Shape:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise key_error(
                "",
                f"min, opt and max need the same number of dimensions, "
                f"found {len(self.min)}, {len(self.opt)} and {len(self.max)}",
            )
        for axis, (low, mid, high) in enumerate(zip(self.min, self.opt, self.max, strict=True)):
            if not low <= mid <= high:
                raise key_error(
                    "", f"axis {axis} must have min <= opt <= max, found {low}, {mid}, {high}"
                )
        return self


class Model(Section):
    """The network to quantize."""

    path: str = Field(description="the ONNX file, relative to the config file", min_length=1)
    shapes: Mapping[str, Shape] = Field(
        default={}, description="input name -> min, opt, max shape; only for dynamic inputs"
    )
    outputs: tuple[str, ...] = Field(
        default=(),
        description="tensors that the model ends at; what lies behind is left out of everything",
    )
    constants: Mapping[str, bool | int | Real | tuple[bool | int | Real, ...]] = Field(
        default={},
        description="input name -> the one value that it has: engines are built without it, and "
        "an If that asks for it becomes the branch it takes",
    )


class Calibration(Section):
    """How activations are turned into scales."""

    method: Method = Field(
        default="auto",
        description="how amax is chosen from a histogram of |x|; auto: a tensor at a time, what "
        "hurts held-out pictures least; entropy: as NVIDIA published it, which clips hard",
    )
    percentile: Annotated[Real, Field(gt=50, le=100)] = Field(
        default=PERCENTILE,
        description="for method percentile: the share of |x| below amax, in percent",
    )
    memory: Bytes = Field(
        default=2 << 30,
        description="what calibration may use above the model's own; less means more passes",
    )
    holdout: Count = Field(
        default=HELD_OUT,
        description="calibration pictures that method auto and the tuner's ranking measure on; "
        "auto takes up to four times as many where the network is small",
    )
    prepare: Literal["auto", "none"] | tuple[PrepareMove, ...] = Field(
        default="auto",
        description="rewrites that change nothing in FP32 and make INT8 better, and codes rounded "
        "on the data: auto keeps what helps on held-out pictures; or a list of scale, shift, "
        "round, bias that are made in any case",
    )
    cache: str | None = Field(
        default=None,
        description="read this TensorRT calibration cache instead of calibrating; naming it here "
        "is enough for one without its key file (CACHE.json)",
    )
    trust_cache: bool = Field(
        default=False,
        description="use `cache` even if its key file says that it was made from something else",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Calibration:
        if self.trust_cache and self.cache is None:
            raise key_error("trust_cache", "needs calibration.cache, the file to be trusted")
        return self


class Target(Section):
    """What the quantized model must reach; exactly one of max_drop, min and max."""

    metric: str = Field(
        description="with labels: top1, top5, ap, ap50, miou (fractions), next_token, perplexity; "
        "against FP32: sqnr_db, cosine, agreement (of classes), detection_agreement, "
        "pixel_agreement, token_agreement; or a function or class of yours as module:name",
        json_schema_extra={
            "anyOf": [
                {"enum": [*KNOWN_METRICS]},
                {"pattern": FUNCTION},
            ]
        },
    )
    max_drop: Annotated[Real, Field(ge=0)] | None = Field(
        default=None,
        description="how far below the FP32 model's value: 0.005 is half a point of top1",
    )
    min: Real | None = Field(
        default=None, description="the value itself: 0.84 of top1, 20 of sqnr_db"
    )
    max: Real | None = Field(
        default=None, description="the highest value, where less is better (perplexity)"
    )
    output: str | None = Field(
        default=None, description="the output that is scored; null: the one that fits"
    )
    decoder: Literal["yolox", "yolov5", "yolov8", "ssd", "detr", "end2end"] | None = Field(
        default=None, description="what a detector's outputs mean; null: by their shapes"
    )
    score: Annotated[Real, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="detections above this count; null: 0.01 for ap and ap50, 0.3 for agreement",
    )
    iou: Annotated[Real, Field(gt=0, le=1)] | None = Field(
        default=None, description="overlap that suppression allows; null: 0.65"
    )

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        known = [*KNOWN_METRICS]
        if metric in known or re.fullmatch(FUNCTION, metric):
            return metric
        raise PydanticCustomError(
            "choice", "{options}", {"options": known, "or_else": " or module:function"}
        )

    @model_validator(mode="after")
    def _one_bound(self) -> Target:
        if self.max_drop is not None and self.min is not None:
            raise key_error("", "give max_drop or min, not both")
        if self.metric == "perplexity" and self.min is not None:
            raise key_error("min", "less perplexity is better: give max, or max_drop (the rise)")
        if self.max is not None and (self.metric in KNOWN_METRICS and self.metric != "perplexity"):
            raise key_error("max", f"more {self.metric} is better: give min or max_drop")
        if self.max is not None and (self.max_drop is not None or self.min is not None):
            raise key_error("max", "give max, max_drop or min, one of them")
        if self.metric in UNLABELLED_METRICS and self.min is None:
            raise key_error("", f"{self.metric} compares with FP32 itself; give min, not max_drop")
        if self.max_drop is None and self.min is None and self.max is None:
            raise key_error("", f"{self.metric} needs max_drop or min")
        if self.metric in (*LABELLED_METRICS, *AGREEMENTS, "next_token"):
            for key, bound in (("max_drop", self.max_drop), ("min", self.min)):
                if bound is not None and not 0 <= bound <= 1:
                    raise key_error(
                        key, f"a fraction from 0 to 1 (0.005 is half a point), found {bound:g}"
                    )
        if self.metric == "cosine" and self.min is not None and not -1 <= self.min <= 1:
            raise key_error("min", f"a cosine lies between -1 and 1, found {self.min:g}")
        return self

    @property
    def needs_labels(self) -> bool:
        """Whether the metric cannot be had without labels."""
        return self.metric in LABELLED_METRICS


class Precision(Section):
    """Which node runs in which precision, and how far the tuner may go."""

    default: Default = Field(
        default="int8",
        description="precision of every node that allows it; qat: as the Q/DQ in the model say",
    )
    allow_requantize: bool = Field(
        default=False,
        description="qat: also take what only TensorFlow and onnxruntime have (uint8, zero "
        "points), made symmetric; that changes the numbers, and the report shows what it costs",
    )
    fallback: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp32",
        description="precision of the nodes that are not quantized; under default: qat fp32 leaves "
        "them in the type that the file has them in",
    )
    pin: Mapping[str, PrecisionName] = Field(
        default={},
        description="node name, op:TYPE or re:PATTERN (of the whole name) -> precision",
    )
    target: Target | None = Field(
        default=None, description="what must be reached; null: quantize and report, without tuning"
    )
    ladder: tuple[PrecisionName, ...] = Field(
        default=(),
        description="what the tuner moves a node that hurts through, from fast to exact, such as "
        "[int8, fp8, fp16, fp32]; it begins with default, and fp8 is left out where the hardware "
        "has none; empty: default, fallback, fp32",
    )
    max_pins: Natural = Field(
        default=16,
        description="most nodes that the tuner may pin; those that it moves to fp8 cost no speed "
        "and do not count",
    )
    max_evaluations: Count | None = Field(
        default=None, description="most plans that the tuner may measure; null: as many as it takes"
    )

    @model_validator(mode="after")
    def _for_qat(self) -> Precision:
        if self.allow_requantize and self.default != "qat":
            raise key_error("allow_requantize", "is for a model with Q/DQ: set default: qat")
        return self

    @field_validator("ladder")
    @classmethod
    def _upwards(cls, ladder: tuple[PrecisionName, ...]) -> tuple[PrecisionName, ...]:
        heights = [LADDER.index(rung) for rung in ladder]
        if heights != sorted(set(heights)):
            raise key_error("", f"each rung once and from fast to exact: {', '.join(LADDER)}")
        return ladder

    @model_validator(mode="after")
    def _ladder_from_default(self) -> Precision:
        first = self.default if self.default != "qat" else "int8"
        if self.ladder and self.ladder[0] != first:
            raise key_error("ladder", f"begins with default, {first}; found {self.ladder[0]}")
        return self

    @field_validator("pin")
    @classmethod
    def _patterns(cls, pin: Mapping[str, PrecisionName]) -> Mapping[str, PrecisionName]:
        for key in pin:
            kind, colon, pattern = key.partition(":")
            if not key or (kind in ("op", "re") and colon and not pattern):
                raise key_error(
                    "", f"{key!r} names nothing; write a node name, op:TYPE or re:REGEX"
                )
            if kind == "re" and colon:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise key_error("", f"{key!r} is not a regular expression: {error}") from None
        return pin


class Compare(Section):
    """How layers are compared with FP32."""

    pictures: Count = Field(
        default=32, description="evaluation pictures that layers are compared on"
    )
    memory: Bytes = Field(
        default=1 << 30,
        description="what the compared tensors may use at a time; a quarter of it, at most 256 "
        "MiB, for the FP32 outputs that are kept, the others lie on disk",
    )
    alone: bool = Field(
        default=True,
        description="also quantize each node alone and measure its effect on the output",
    )
    seconds: Annotated[Real, Field(gt=0)] = Field(
        default=600.0,
        description="what measuring nodes alone may take; the report says which are left out",
    )


class Latency(Section):
    """How long one inference takes is measured so."""

    warmup: Natural = Field(default=10, description="inferences before the clock starts")
    runs: Count = Field(default=50, description="inferences that are timed")
    batch: Count = Field(default=1, description="samples an inference")


class Execution(Section):
    """Where networks run while they are calibrated, tuned and measured."""

    device: str = Field(
        default="cpu",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="cpu; cuda or cuda:N: an NVIDIA GPU through onnxruntime-gpu; auto: a GPU where "
        "one can be used, else the CPU",
    )
    ray: str | None = Field(
        default=None,
        min_length=1,
        description="a Ray cluster that shares out calibration, errors of layers and evaluation: "
        "auto (the one that this machine belongs to), host:port, or local (one of this machine's "
        "cores); null: everything in this process",
    )


class Report(Section):
    """What is written at the end."""

    formats: tuple[ReportFormat, ...] = Field(
        default=("md", "html", "csv", "json"),
        description="which of report.md, report.html, layers.csv, run.json; run.json is always "
        "written",
    )
    latency: Latency | None = Field(
        default=Latency(), description="how latency is measured; null: not at all"
    )


class Config(Section):
    """Everything a run needs: model, data, target and runtimes."""

    version: Literal[1] = Field(description="version of this config language: 1")
    name: str = Field(
        description="name of the run and of its folder: letters, digits, '.', '_', '-'",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
    )
    model: Model = Field(description="the network to quantize")
    data: Data = Field(description="pictures or arrays to calibrate with and to measure on")
    calibration: Calibration = Field(
        default=Calibration(), description="how activations are turned into scales"
    )
    precision: Precision = Field(
        default=Precision(), description="which node runs in which precision, and the target"
    )
    outputs: tuple[str, ...] = Field(
        default=(),
        description="outputs that are judged, in target, ranges and ranking; none named: all of "
        "them, each by its own energy, and the worst decides",
    )
    compare: Compare = Field(default=Compare(), description="how layers are compared with FP32")
    backends: tuple[Backend, ...] = Field(
        default=(OnnxRuntime(name="onnxruntime"),),
        description="runtimes; each gives one engine",
        json_schema_extra={"minItems": 1},
    )
    runtime: Execution = Field(
        default=Execution(), description="where the network runs while it is worked on"
    )
    report: Report = Field(default=Report(), description="what is written at the end")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        target = self.precision.target
        for name in ("evaluation", "validation"):
            section = self.data.sections.get(name)
            unlabelled = section is not None and section.labels is None
            if target is not None and target.needs_labels and unlabelled:
                raise key_error(
                    "precision.target.metric",
                    f"{target.metric} needs labels, but data.{name}.labels is null; "
                    "give labels, or use sqnr_db or cosine with min",
                )
        if not self.backends:
            raise key_error("backends", "the list is empty; give at least one")
        seen: set[str] = set()
        for index, backend in enumerate(self.backends):
            if backend.label in seen:
                raise key_error(
                    f"backends.{index}", f"{backend.label} is listed twice; each gives one engine"
                )
            seen.add(backend.label)
        return self
