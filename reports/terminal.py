"""The result table as rich renderables; only the command line prints them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import (
    Console,
    ConsoleOptions,
    Group,
    JustifyMethod,
    RenderableType,
    RenderResult,
)
from rich.table import Table as RichTable
from rich.text import Text

from trtune.reports.record import RunRecord
from trtune.reports.summary import (
    STATUS,
    headline,
    outlier_sentences,
    samples_text,
    verdict,
)
from trtune.reports.tables import Table, compare_table, result_table

GAP = 3
VERDICTS = "target"
"""The column that says of each row whether it meets the target."""
STATUS_STYLES = {"met": "bold green", "missed": "bold yellow", "failed": "bold red"}


@dataclass(frozen=True, slots=True)
class FittedTable:
    """A `Table` that is cut into several, each with the text columns, where it is too wide."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for columns in self.parts(options.max_width):
            yield self._draw(columns)

    def parts(self, width: int) -> list[list[int]]:
        """The columns of each table of at most `width` characters (or of one number column)."""
        table, head = self.table, list(range(self.table.text_columns))
        cells = [table.columns, *table.rows]
        widths = [max(cell_len(row[i]) for row in cells) + GAP for i in range(len(table.columns))]
        fixed = sum(widths[i] for i in head)
        parts, used = [list(head)], fixed
        for index in range(table.text_columns, len(table.columns)):
            if used + widths[index] > width and len(parts[-1]) > len(head):
                parts.append(list(head))
                used = fixed
            parts[-1].append(index)
            used += widths[index]
        return parts

    def _draw(self, columns: list[int]) -> RichTable:
        drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for index in columns:
            justify: JustifyMethod = "left" if index < self.table.text_columns else "right"
            drawn.add_column(Text(self.table.columns[index]), justify=justify, overflow="fold")
        for row in self.table.rows:
            style = "bold" if row[0] == "tuned" else None
            drawn.add_row(*(self._cell(row, index) for index in columns), style=style)
        return drawn

    def _cell(self, row: tuple[str, ...], index: int) -> Text:
        """A cell as it is; a verdict in the colour of what it says."""
        if self.table.columns[index] != VERDICTS:
            return Text(row[index])
        return Text(row[index], STATUS_STYLES.get(row[index].split(",")[0], ""))


def render_table(table: Table) -> RenderableType:
    """A `Table` with its footnotes below. Cells are shown as they are, never read as markup."""
    notes = [
        Text(f"{mark} {text}", style="dim")
        for mark, text in zip(table.marks, table.footnotes, strict=True)
    ]
    return Group(FittedTable(table), *notes)


def render_result(record: RunRecord) -> RenderableType:
    """Status and headline, the result table, and what the user should know beside it."""
    style = STATUS_STYLES[record.status]
    badge = STATUS[record.status] if record.target or record.status == "failed" else "done"
    title = Text.assemble((record.name, "bold"), "  ", (badge, style))
    said = (headline(record), verdict(record), samples_text(record))
    lines = [Text(line) for line in said if line]
    hints = [Text(f"• {hint}", style="dim") for hint in [*outlier_sentences(record), *record.notes]]
    return Group(title, *lines, render_table(result_table(record)), *hints)


def render_several(records: Sequence[RunRecord]) -> RenderableType:
    """Several runs side by side."""
    return render_table(compare_table(records))
