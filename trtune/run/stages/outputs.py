"""The outputs of the final models on a few pictures, as a stage: for Polygraphy's own tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtune.precision.compare.run_results import (
    few_batches,
    polygraphy_run,
    save_inputs,
    save_run_results,
)
from trtune.precision.graph.file import Model
from trtune.precision.runtime.api import Backend, BuildInfo, Candidate
from trtune.precision.runtime.session import OrtEngine
from trtune.run.data import RunData
from trtune.run.stage import Form, Kept, Stage
from trtune.run.stages.engines import FP32, measured_with
from trtune.run.stages.measuring import session_of

FOLDER, INPUTS = Path("polygraphy"), "inputs.json"


@dataclass(frozen=True, slots=True)
class Final:
    """The engine that came of a backend: what it was built of, and where it is."""

    backend: Backend
    candidate: Candidate
    info: BuildInfo


def kept_outputs(model: Model, finals: Mapping[str, Final], data: RunData) -> Stage[list[str]]:
    """Outputs of the FP32 `model` and of each of `finals`, and the inputs that gave them.

    In files below `polygraphy/`, whose names the stage gives.
    """

    def make(folder: Path) -> list[str]:
        (folder / FOLDER).mkdir(exist_ok=True)
        exact = OrtEngine(session_of(model))
        with exact:
            batches = few_batches(exact, data.source)
        save_inputs(folder / FOLDER / INPUTS, batches)
        engines: dict[str, Any] = {FP32: exact}
        for name, final in finals.items():
            assert final.info.path is not None
            engines[name] = final.backend.load(final.info.path.parent)
        for name, engine in engines.items():
            with engine as running:
                save_run_results(folder / outputs_file(name), {name: running}, batches)
        return [(FOLDER / INPUTS).as_posix(), *(outputs_file(n).as_posix() for n in engines)]

    needs: dict[str, Any] = {"model": model, data.where: data.need}
    for name, final in finals.items():
        needs[name] = measured_with(final.candidate, final.backend)
    return Stage(
        "outputs", needs, make, Form(_write, lambda value, folder: list(value), rooted=True)
    )


def _write(found: list[str], folder: Path) -> Kept:
    return found, tuple(found)


def outputs_file(name: str) -> Path:
    """Where the outputs of a model are, seen from the run's folder."""
    return FOLDER / f"{name.replace('/', '-')}.json"


def polygraphy_lines(run: Path, finals: Mapping[str, Final]) -> list[str]:
    """What repeats the outputs of `finals` and shows them, from the folder `run`."""
    lines = []
    for name, final in finals.items():
        assert final.info.path is not None
        model = final.info.path.relative_to(run)
        line = polygraphy_run(model, outputs_file(name), inputs=FOLDER / INPUTS)
        rtx = final.backend.name.partition("/")[0] == "tensorrt_rtx"
        lines.append(f"POLYGRAPHY_USE_TENSORRT_RTX=1 {line}" if rtx else line)
    return [*lines, *(f"polygraphy inspect data {outputs_file(n).as_posix()} --show-values"
                      for n in (FP32, *finals))]  # fmt: skip
