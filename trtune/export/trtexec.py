"""For trtexec: the Q/DQ model, and for TensorRT 10 the FP32 model with cache and pins."""

from __future__ import annotations

from pathlib import Path

from trtune.export.bundle import Bundle, implicit_plan
from trtune.export.files import (
    CACHE_NAME,
    FP32_FILE,
    QDQ_FILE,
    DeviceStep,
    Export,
    cache_notes,
    write_cache,
    write_fp32,
    write_qdq,
    write_script,
)
from trtune.precision.backends.trt.command import strong_options, trtexec_command, weak_options
from trtune.precision.backends.trt.weak import flag_names

QDQ_TITLE = "TensorRT {}, the Q/DQ model, strongly typed"
CACHE_TITLE = "TensorRT 10, calibration cache and pins, weakly typed"


def write_trtexec(bundle: Bundle, folder: Path) -> Export:
    """Write the models, the cache and a script for each way to build."""
    write_qdq(bundle, folder / QDQ_FILE)
    write_fp32(bundle, folder / FP32_FILE)
    has_cache = write_cache(bundle, folder / CACHE_NAME)
    files, steps = [QDQ_FILE, FP32_FILE], []
    for major in (11, 10):
        command = explicit_command(bundle, major)
        steps.append(DeviceStep(QDQ_TITLE.format(major), command))
        files.append(f"build-trt{major}.sh")
        write_script(folder / files[-1], command, steps[-1].title)
    notes = ["The two ways give different engines: the scales are the same, the fusions are not."]
    if has_cache:
        files.append(CACHE_NAME)
    command, left_out = implicit_command(bundle, has_cache=has_cache)
    steps.append(DeviceStep(CACHE_TITLE, command))
    files.append("build-trt10-cache.sh")
    write_script(folder / files[-1], command, CACHE_TITLE)
    if left_out:
        notes.append(f"trtexec's syntax cannot name these layers: {', '.join(left_out)}")
    return Export("trtexec", folder, tuple(files), tuple(steps), (*notes, *cache_notes(bundle)))


def explicit_command(bundle: Bundle, major: int, engine: str = "engine.plan") -> str:
    """trtexec for the Q/DQ model under TensorRT `major`."""
    return trtexec_command(
        Path(QDQ_FILE),
        Path(engine),
        settings=bundle.settings,
        profiles=bundle.profiles,
        typing=strong_options(major),
    )


def implicit_command(bundle: Bundle, *, has_cache: bool) -> tuple[str, tuple[str, ...]]:
    """trtexec for the FP32 model with cache and pins, and the layers it cannot name."""
    flags = flag_names(implicit_plan(bundle.plan), constraints=bundle.settings.constraints)
    cache = Path(CACHE_NAME) if has_cache else None
    typing, left_out = weak_options(tuple(flags), bundle.constrained, cache)
    command = trtexec_command(
        Path(FP32_FILE),
        Path("engine.plan"),
        settings=bundle.settings,
        profiles=bundle.profiles,
        typing=typing,
    )
    return command, left_out
