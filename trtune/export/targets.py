"""The tools that a run can be exported to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from trtune.configs.errors import InputError, did_you_mean
from trtune.configs.files import write_text
from trtune.export.bundle import Bundle
from trtune.export.deepstream import write_deepstream
from trtune.export.files import Export, readme
from trtune.export.onnxruntime_options import write_ort
from trtune.export.polygraphy_script import write_polygraphy
from trtune.export.triton import write_triton
from trtune.export.trtexec import write_trtexec

TARGETS: Mapping[str, Callable[[Bundle, Path], Export]] = {
    "trtexec": write_trtexec,
    "deepstream": write_deepstream,
    "triton": write_triton,
    "ort": write_ort,
    "polygraphy": write_polygraphy,
}
README_FILE = "README.md"


def export_run(
    run: Path | str, target: str, folder: Path | str | None = None, *, overwrite: bool = False
) -> Export:
    """Write the finished run `run` as the files that `target` reads, and a README.

    `folder` is by default `export-TARGET` in the run's folder. Raises InputError for an unknown
    target, a folder that holds files unless `overwrite`, and a run that cannot be read.
    """
    if target not in TARGETS:
        raise InputError(
            f"--to {target!r} is none of {', '.join(TARGETS)}{did_you_mean(target, TARGETS)}"
        )
    run = Path(run)
    home = run if run.is_dir() else run.parent
    folder = home / f"export-{target}" if folder is None else Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"{folder} holds files already; use --force, or another --output")
    bundle = Bundle.of(run)
    folder.mkdir(parents=True, exist_ok=True)
    export = TARGETS[target](bundle, folder)
    write_text(folder / README_FILE, readme(bundle, export))
    return export
