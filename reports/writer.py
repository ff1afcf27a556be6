"""Writes a run's report files, each in one step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from trtune.configs.errors import DataError, did_you_mean
from trtune.configs.files import write_text
from trtune.reports.differences import Difference, read_files, run_differences
from trtune.reports.html import report_html
from trtune.reports.markdown import report_markdown
from trtune.reports.record import LayerRow, RunRecord
from trtune.reports.tables import dump_layers, result_frame

log = logging.getLogger(__name__)

FORMATS: dict[str, dict[str, Callable[[RunRecord, Sequence[LayerRow]], str]]] = {
    "md": {"report.md": report_markdown},
    "html": {"report.html": report_html},
    "csv": {
        "layers.csv": lambda record, layers: dump_layers(layers),
        "variants.csv": lambda record, layers: result_frame(record).to_csv(
            index=False, lineterminator="\n"
        ),
    },
    "json": {"run.json": lambda record, layers: record.to_json()},
}


def write_report(
    folder: Path,
    record: RunRecord,
    layers: Sequence[LayerRow] = (),
    *,
    formats: Sequence[str] = ("md", "html", "csv", "json"),
) -> list[Path]:
    """Write the files of `formats` into `folder` and return their paths.

    `layers.csv` is left as it is when `layers` is empty: a run that compared nothing does not
    erase an earlier comparison. Raises ValueError for an unknown format, TrtuneError if the file
    system refuses.
    """
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"unknown report format {name!r}{did_you_mean(name, FORMATS)}")
    written = []
    for name in formats:
        for file, render in FORMATS[name].items():
            if file == "layers.csv" and not layers:
                continue
            write_text(Path(folder) / file, render(record, layers))
            written.append(Path(folder) / file)
    log.info("report: %s", ", ".join(map(str, written)))
    return written


def _check_target(record: RunRecord) -> None:
    """Raise ValueError for a target whose bounds are no numbers."""
    for key in ("min", "max_drop"):
        value = (record.target or {}).get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"target.{key} is {value!r}, not a number")


def read_record(path: Path) -> RunRecord:
    """Read `run.json`, or the one in the folder `path`.

    Raises DataError if it is not there, cannot be read, or is not a run record.
    """
    file = Path(path) / "run.json" if Path(path).is_dir() else Path(path)
    try:
        record = RunRecord.from_json(file.read_text(encoding="utf-8"))
        _check_target(record)
        return record
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; give a run's folder or its run.json") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a run record: {error}") from error


def runs_among(places: Sequence[Path | str]) -> list[tuple[Path, RunRecord]]:
    """The run folders among `places` (or their run.json), each with its record.

    What is no run is left out, and the log says so. Raises DataError if nothing else is there.
    """
    found: list[tuple[Path, RunRecord]] = []
    wrong: list[DataError] = []
    for place in map(Path, places):
        try:
            found.append((place if place.is_dir() else place.parent, read_record(place)))
        except DataError as error:
            wrong.append(error)
    if wrong and not found:
        raise wrong[0]
    for refused in wrong:
        log.warning("left out: %s", refused)
    return found


def differences_of(runs: Sequence[tuple[Path, RunRecord]]) -> list[Difference]:
    """What differs between two runs; of more, nothing: their tables stand side by side."""
    if len(runs) != 2:
        return []
    first, second = (read_files(record, folder) for folder, record in runs)
    return run_differences(first, second)
