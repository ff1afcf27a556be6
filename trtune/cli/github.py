"""Annotations and the step summary of GitHub Actions, where a command runs in one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from trtune.reports.record import RunRecord


def is_here() -> bool:
    """Whether this process runs in a step of GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def annotation(kind: Literal["error", "warning"], message: str, title: str = "trtune") -> str:
    """The workflow command that shows `message` beside the step.

    >>> annotation("error", "a: 100 %\\nb", "t")
    '::error title=t::a: 100 %25%0Ab'
    """
    named = _escaped(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={named}::{_escaped(message)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def annotate(file: IO[str], kind: Literal["error", "warning"], message: str) -> None:
    """Write an annotation to `file`, if this is GitHub Actions."""
    if is_here():
        file.write(annotation(kind, message) + "\n")
        file.flush()


def summarize(file: IO[str], record: RunRecord) -> None:
    """Add the result table to the step's summary, and annotate a target that was missed."""
    if not is_here():
        return
    from trtune.reports.markdown import escape, table_markdown
    from trtune.reports.summary import STATUS, headline, verdict
    from trtune.reports.tables import result_table

    if record.status == "missed":
        annotate(file, "warning", f"{record.name}: {verdict(record) or headline(record)}")
    place = os.environ.get("GITHUB_STEP_SUMMARY")
    if place:
        lines = [
            f"## {escape(record.name)}: {STATUS[record.status]}",
            escape(headline(record)),
            escape(verdict(record)),
            table_markdown(result_table(record)),
        ]
        with Path(place).open("a", encoding="utf-8") as summary:
            summary.write("\n\n".join(filter(None, lines)) + "\n")
