"""What a run tells its caller of where it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinyproject import config_of, write_project

from trtune.run.pipeline import STAGES, run


class Listener:
    """A `StagedProgress` that remembers what it is told."""

    def __init__(self) -> None:
        self.announced: list[tuple[str, ...]] = []
        self.entered: list[str] = []
        self.during: dict[str, set[str]] = {}

    def stages(self, names: Sequence[str]) -> None:
        self.announced.append(tuple(names))

    def stage(self, name: str) -> None:
        self.entered.append(name)

    def __call__(self, what: str, done: int, total: int | None) -> None:
        self.during.setdefault(self.entered[-1], set()).add(what)


def test_a_run_says_its_stages_and_each_as_it_begins(tmp_path: Path) -> None:
    folder, told = write_project(tmp_path), Listener()
    run(config_of(folder), out=folder / "runs", progress=told)
    assert told.announced == [STAGES]
    assert tuple(told.entered) == STAGES
    assert "calibrate" in told.during["calibrate"]
    assert "comparing layers" in told.during["compare"]
