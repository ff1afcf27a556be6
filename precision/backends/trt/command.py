"""The trtexec command that builds the same engine, for people who want to do it by hand."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from trtune.precision.backends.gpu.profiles import Profile
from trtune.precision.backends.trt.build import Settings
from trtune.precision.backends.trt.weak import trtexec_constraints

HARDWARE_LEVELS: Mapping[str, str] = {
    "ampere_plus": "ampere+",
    "same_compute_capability": "sameComputeCapability",
}
"""Hardware compatibility -> trtexec's word for it."""


def trtexec_command(
    model: Path,
    engine: Path,
    *,
    settings: Settings,
    profiles: Mapping[str, Profile],
    typing: tuple[str, ...],
) -> str:
    """One line for a shell. `typing` are the options that `weak_options` or `strong_options` gave.

    >>> trtexec_command(Path("m.onnx"), Path("e.plan"), settings=Settings(), profiles={}, typing=())
    'trtexec --onnx=m.onnx --saveEngine=e.plan --noTF32 --profilingVerbosity=detailed'
    """
    words = ["trtexec", f"--onnx={model}", f"--saveEngine={engine}", *typing]
    for word in ("min", "opt", "max") if profiles else ():
        sizes = (f"{name}:{_joined(p.to_json()[word])}" for name, p in profiles.items())
        words.append(f"--{word}Shapes={','.join(sizes)}")
    if not settings.tf32:
        words.append("--noTF32")
    if settings.workspace is not None:
        words.append(f"--memPoolSize=workspace:{settings.workspace / (1 << 20):g}M")
    if settings.optimization_level is not None:
        words.append(f"--builderOptimizationLevel={settings.optimization_level}")
    if settings.timing_cache is not None:
        words.append(f"--timingCacheFile={settings.timing_cache}")
    if settings.version_compatible:
        words.append("--versionCompatible")
    if settings.hardware_compatibility != "none":
        level = settings.hardware_compatibility
        words.append(f"--hardwareCompatibilityLevel={HARDWARE_LEVELS[level]}")
    if settings.tactic_sources is not None:
        sources = ",".join(f"+{name.upper()}" for name in settings.tactic_sources)
        words.append(f"--tacticSources={sources}")
    if settings.dla_core is not None:
        words += [f"--useDLACore={settings.dla_core}", "--allowGPUFallback"]
    if settings.device:
        words.append(f"--device={settings.device}")
    words.append("--profilingVerbosity=detailed")
    return shlex.join(words)


def _joined(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def strong_options(major: int) -> tuple[str, ...]:
    """From 11 on there is nothing but strong typing, and no option for it."""
    return ("--stronglyTyped",) if major < 11 else ()


def weak_options(
    flags: tuple[str, ...], precisions: Mapping[str, str], cache: Path | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The options for builder `flags`, layer -> precision and the calibration cache; and the
    layers that trtexec's syntax cannot name.

    >>> weak_options(("INT8", "OBEY_PRECISION_CONSTRAINTS"), {"conv": "fp32"}, Path("c.cache"))[0]
    ('--int8', '--calib=c.cache', '--precisionConstraints=obey', '--layerPrecisions=conv:fp32', \
'--layerOutputTypes=conv:fp32')
    """
    words = [f"--{name.lower()}" for name in flags if "_" not in name]
    if cache is not None:
        words.append(f"--calib={cache}")
    left_out: tuple[str, ...] = ()
    constraints = next((n for n in flags if n.endswith("_PRECISION_CONSTRAINTS")), None)
    if constraints:
        text, left_out = trtexec_constraints(precisions)
        words.append(f"--precisionConstraints={constraints.split('_')[0].lower()}")
        if text:
            words += [f"--layerPrecisions={text}", f"--layerOutputTypes={text}"]
    return tuple(words), left_out
