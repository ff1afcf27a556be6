"""What every TensorRT build has in common: settings, profiles, the log, parsing, why it failed.

Everything here exists in 10.x and 11.x alike, or is asked for with `hasattr`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtune.configs.errors import ConfigError, ModelError, TrtuneError, did_you_mean
from trtune.configs.values import format_bytes
from trtune.precision.backends.gpu.profiles import Profile
from trtune.precision.traces.explain import explain_log

log = logging.getLogger(__name__)

LOG_TAIL = 40
OUT_OF_MEMORY = re.compile(
    r"insufficient workspace|insufficient memory|out ?of ?memory|MemoryAllocation|"
    r"MEM_ALLOC|failed to allocate",
    re.IGNORECASE,
)
NO_IMPLEMENTATION = re.compile(
    r"Could not find any implementation for node (.+?)(?:\.\)| due|\.?$)"
)
HARDWARE_COMPATIBILITY = ("none", "ampere_plus", "same_compute_capability")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to build: what the config's `tensorrt` backend says, as plain values.

    `typing` is auto, weak or strong; `calibrator` table, entropy2 or minmax; `constraints` obey or
    prefer. `workspace` in bytes. `hardware_compatibility` is none, ampere_plus or
    same_compute_capability. `tactic_sources` None leaves them to TensorRT. Unless `tf32` is on,
    float32 stays float32.
    """

    typing: str = "auto"
    calibrator: str = "table"
    constraints: str = "obey"
    workspace: int | None = None
    timing_cache: Path | None = None
    optimization_level: int | None = None
    device: int = 0
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    tactic_sources: tuple[str, ...] | None = None
    dla_core: int | None = None
    tf32: bool = False

    def as_json(self) -> dict[str, Any]:
        """Everything that decides the engine, as JSON has it (so not the timing cache)."""
        sources = None if self.tactic_sources is None else list(self.tactic_sources)
        names = (
            *("typing", "calibrator", "constraints", "workspace", "optimization_level", "device"),
            *("hardware_compatibility", "version_compatible", "dla_core", "tf32"),
        )
        return {**{name: getattr(self, name) for name in names}, "tactic_sources": sources}


class BuildLog:
    """The messages of one build, without the verbose ones."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []

    def add(self, severity: str, message: str) -> None:
        """Keep a message; `severity` is TensorRT's name for it."""
        if severity == "VERBOSE":
            return
        self.lines.append(f"[{severity}] {message}")
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)
        log.debug("TensorRT: %s", message)

    def text(self) -> str:
        """All of it, one message a line."""
        return "".join(f"{line}\n" for line in self.lines)

    def tail(self) -> str:
        """Its last lines, for the record."""
        return "\n".join(self.lines[-LOG_TAIL:])


def make_builder(trt: Any, logger: Any, messages: BuildLog) -> Any:
    """A builder. Raises TrtuneError if TensorRT cannot make one, as without a GPU."""
    try:
        return trt.Builder(logger)
    except (TypeError, RuntimeError) as error:
        said = messages.errors[-1] if messages.errors else str(error)
        raise TrtuneError(
            f"TensorRT {trt.__version__} cannot start here: {said}. It needs an NVIDIA GPU and a "
            "driver that is new enough for it; `trtune doctor` says what was found"
        ) from error


def create_network(trt: Any, builder: Any, *, strongly_typed: bool) -> Any:
    """An empty network; the flag's number differs between versions, and 11 may drop the flag."""
    flags = 0
    if strongly_typed and hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return builder.create_network(flags)


def parse_model(trt: Any, network: Any, logger: Any, path: Path, opset: int) -> None:
    """Fill `network` from the ONNX file at `path`.

    Raises ModelError with node, operator, opset and the parser's words if it does not take it.
    """
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(path)):
        return
    reasons = []
    for index in range(parser.num_errors):  # texts live no longer than the parser
        error = parser.get_error(index)
        name, op = str(error.node_name()), str(error.node_operator())
        where = f"node {name!r} ({op}, opset {opset})" if name or op else "the model"
        reasons.append(f"{where}: {str(error.desc()).strip()}")
    more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
    raise ModelError(
        f"TensorRT {trt.__version__} cannot take {path.name}: "
        f"{'; '.join(reasons[:3]) or 'the parser gave no reason'}{more}. Export the model with "
        "another opset or without that operator; `trtune inspect MODEL` lists its nodes"
    )


def can_show_unfused(trt: Any) -> bool:
    """Whether this version can show inner tensors without keeping layers apart: from 10.11 on."""
    return hasattr(trt.INetworkDefinition, "mark_unfused_tensors_as_debug_tensors")


def show_unfused(trt: Any, network: Any) -> None:
    """Let the engine of `network` show every tensor that fusion leaves whole.

    Raises TrtuneError if TensorRT refuses.
    """
    if not network.mark_unfused_tensors_as_debug_tensors():
        raise TrtuneError(
            f"TensorRT {trt.__version__} refuses to show the inner tensors of this network; "
            "build.log holds what it said"
        )


def configure(trt: Any, builder: Any, config: Any, settings: Settings) -> list[str]:
    """Put `settings` into a builder config, but for profiles and the timing cache.

    What this version of TensorRT lacks is left out and told in the sentences returned. Raises
    ConfigError for a setting that names nothing, TrtuneError for a DLA core that is not there.
    """
    notes: list[str] = []
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default: then FP32 would be 10 bits
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatibility != "none":
        level = _member(trt.HardwareCompatibilityLevel, settings.hardware_compatibility,
                        "hardware_compatibility", HARDWARE_COMPATIBILITY)  # fmt: skip
        config.hardware_compatibility_level = level
    if settings.tactic_sources is not None:
        notes += _set_tactic_sources(trt, config, settings.tactic_sources)
    if settings.dla_core is not None:
        _use_dla(trt, builder, config, settings.dla_core)
    return notes


def _member(enum: Any, name: str, key: str, known: Sequence[str]) -> Any:
    if name.lower() not in known:
        raise ConfigError(
            f"{key}: {name!r} is none of {', '.join(known)}{did_you_mean(name, known)}"
        )
    return getattr(enum, name.upper())


def _set_tactic_sources(trt: Any, config: Any, sources: Sequence[str]) -> list[str]:
    present = [name for name in sources if hasattr(trt.TacticSource, name.upper())]
    mask = 0
    for name in present:
        mask |= 1 << int(getattr(trt.TacticSource, name.upper()))
    config.set_tactic_sources(mask)
    return [
        f"tactic source {name} does not exist in TensorRT {trt.__version__}: left out"
        for name in sources
        if name not in present
    ]


def _use_dla(trt: Any, builder: Any, config: Any, core: int) -> None:
    count = builder.num_DLA_cores
    if core >= count:
        raise TrtuneError(
            f"dla_core: {core} was asked for, and this machine has {count or 'no'} DLA core"
            f"{'s' if count != 1 else ''}; leave `dla_core` out to build for the GPU"
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def add_profile(builder: Any, config: Any, profiles: Mapping[str, Profile]) -> Any | None:
    """Add the profile of the dynamic inputs, and give it; None if there are none."""
    if not profiles:
        return None
    profile = builder.create_optimization_profile()
    for name, given in profiles.items():
        profile.set_shape(name, given.min, given.opt, given.max)
    if config.add_optimization_profile(profile) < 0:
        raise ConfigError(
            "model.shapes: TensorRT refuses the ranges of "
            f"{', '.join(profiles)}; min, opt and max must rise, and every dimension be at least 1"
        )
    return profile


def build_failure(trt: Any, messages: BuildLog, settings: Settings, *, pinned: bool) -> TrtuneError:
    """Why a build gave nothing, and what to do; `pinned`: layers were held to a precision."""
    said = "; ".join(dict.fromkeys(messages.errors[-3:])) or "it gave no reason"
    told = "\n".join(messages.errors) + "\n" + "\n".join(messages.lines[-LOG_TAIL:])
    limit = "" if settings.workspace is None else f" (now {format_bytes(settings.workspace)})"
    stuck = NO_IMPLEMENTATION.search(told)
    if OUT_OF_MEMORY.search(told):
        advice = (
            f"It ran out of memory: raise `workspace`{limit} if it is set, take a smaller "
            "`model.shapes` max, lower `optimization_level`, or free the GPU (nvidia-smi lists who "
            "holds its memory)"
        )
    elif stuck:
        advice = f"There is no kernel for {stuck[1]!r}: pin its nodes to fp32 in `precision.pin`"
        if pinned and settings.constraints == "obey":
            advice += ", or let pins yield with `constraints: prefer`"
    elif pinned and settings.constraints == "obey":
        advice = "A pin may be impossible: `constraints: prefer` lets pins yield"
    else:
        problems = explain_log(told).problems
        known = [str(event) for event in problems if event.key != "not explained"]
        advice = known[0] if known else "build.log beside the engine holds all that it said"
    return TrtuneError(f"TensorRT {trt.__version__} could not build the engine: {said}. {advice}")
