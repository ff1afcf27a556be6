"""The `backends` section: one model a runtime, told apart by `name`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trtune.configs.values import (
    BUILD_SECONDS,
    Bytes,
    ComputeCapability,
    Count,
    Natural,
    Real,
    Section,
    key_error,
)


class Runtime(Section):
    """What every runtime has."""

    required: bool = Field(
        default=False,
        description="stop before anything is computed if it is absent here (not installed, no "
        "GPU); else the report says so, and the other backends go on",
    )


class OnnxRuntime(Runtime):
    """onnxruntime on the CPU."""

    name: Literal["onnxruntime"] = Field(description="which runtime")
    lowering: Literal["emulate", "deploy"] = Field(
        default="emulate",
        description="emulate: the Q/DQ graph as TensorRT wants it; deploy: as a CPU runs it fast",
    )
    threads: Count | None = Field(default=None, description="threads an operator; null: all cores")

    @property
    def label(self) -> str:
        """The name in reports and of the folder, such as 'onnxruntime/emulate'."""
        return f"{self.name}/{self.lowering}"


class TensorRTRTX(Runtime):
    """TensorRT-RTX; builds without a GPU."""

    name: Literal["tensorrt_rtx"] = Field(description="which runtime")
    compute_capabilities: tuple[ComputeCapability, ...] = Field(
        default=(), description='GPUs to build for, such as ["8.9"]; empty: the one in this machine'
    )
    apart: bool = Field(
        default=False,
        description="beside the engine for all compute_capabilities one for each of them; with "
        "runtime.ray each is built by a task of its own",
    )
    workspace: Bytes | None = Field(
        default=None, description="scratch memory of a build; null: the compiler's own limit"
    )
    optimization_level: Annotated[Natural, Field(le=5)] | None = Field(
        default=None,
        description="0 builds fastest, 5 searches longest; null: TensorRT's own default",
    )
    timeout: Annotated[Real, Field(gt=0)] = Field(
        default=BUILD_SECONDS, description="seconds after which a build is ended"
    )
    tf32: bool = Field(
        default=False, description="let what is planned in fp32 be computed in TF32 (19 bits)"
    )

    @property
    def label(self) -> str:
        """The name in reports and of the folder."""
        return self.name


class TensorRT(Runtime):
    """TensorRT 10.x or 11.x, whichever is installed; needs a GPU."""

    name: Literal["tensorrt"] = Field(description="which runtime")
    typing: Literal["auto", "weak", "strong"] = Field(
        default="auto",
        description="weak: precision flags and calibrators (10.x only); strong: Q/DQ in the graph; "
        "auto: weak where it exists",
    )
    calibrator: Literal["table", "entropy2", "minmax"] = Field(
        default="table",
        description="weak typing: table feeds our scales through the cache; entropy2 and minmax "
        "let TensorRT calibrate by itself on the same pictures",
    )
    constraints: Literal["obey", "prefer"] = Field(
        default="obey",
        description="weak typing: a pin that cannot be honoured fails the build, or yields",
    )
    workspace: Bytes | None = Field(
        default=None, description="scratch memory of a build; null: TensorRT's own limit"
    )
    timing_cache: str | None = Field(
        default=None, description="file with kernel timings, read if it is there and written again"
    )
    optimization_level: Annotated[Natural, Field(le=5)] | None = Field(
        default=None,
        description="0 builds fastest, 5 searches longest; null: TensorRT's own default",
    )
    device: Natural = Field(default=0, description="index of the GPU")
    gpu_types: tuple[str, ...] = Field(
        default=(),
        description="types of GPU in the cluster of runtime.ray, as Ray calls them (H100, L4): an "
        "engine for each is built on a node that has one",
    )
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = Field(
        default="none", description="GPUs that the engine runs on beside the one it is built on"
    )
    version_compatible: bool = Field(
        default=False, description="an engine that later TensorRT of the same major version runs"
    )
    tactic_sources: tuple[str, ...] | None = Field(
        default=None, description="libraries to take kernels from; null: TensorRT's own choice"
    )
    dla_core: Natural | None = Field(
        default=None, description="run on this DLA core what it can take; null: on the GPU"
    )
    tf32: bool = Field(
        default=False, description="let what is planned in fp32 be computed in TF32 (19 bits)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TensorRT:
        if self.typing == "strong" and self.calibrator != "table":
            raise key_error(
                "calibrator", f"{self.calibrator!r} needs weak typing; strong typing has only table"
            )
        if self.gpu_types and self.calibrator != "table":
            raise key_error(
                "gpu_types",
                f"calibrator {self.calibrator!r} reads pictures while it builds, which nodes of a "
                "cluster do not have; take table",
            )
        return self

    @property
    def label(self) -> str:
        """The name in reports and of the folder, such as 'tensorrt' or 'tensorrt/strong'."""
        return self.name if self.typing == "auto" else f"{self.name}/{self.typing}"


Backend = Annotated[OnnxRuntime | TensorRTRTX | TensorRT, Field(discriminator="name")]
