"""What the page's script knows of layers, tensors and pictures: JSON inside the page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from trtune.reports.page.layers import LayerColumn
from trtune.reports.page.template import MOVE_TEXTS
from trtune.reports.record import LayerRow, RunRecord
from trtune.reports.summary import number, ratio_text


def page_data(record: RunRecord, layers: Sequence[LayerRow], columns: Sequence[LayerColumn]) -> str:
    """JSON text that may stand in a script element, whatever names hold.

    `fields` are the table's columns; `rows` has for each layer the index of the tensor that it
    reads quantized (or -1) and the rows of its producers, counted from 1; `tensors` has name, amax
    and largest value in words, the place of amax in the histogram (0 to 1, more if beyond), the
    histogram's heights, and the picture that sets the largest value with a sentence; `prepared`
    what was done to a tensor or layer.
    """
    index = {entry.tensor: k for k, entry in enumerate(record.ranges)}
    return script_text(
        {
            "fields": [column.field for column in columns],
            "titles": [column.title for column in columns],
            "rows": [
                [index.get(row.tensor, -1), [int(word) for word in row.producers.split()]]
                for row in layers
            ],
            "tensors": [
                [
                    r.tensor,
                    f"{r.method} · amax {number(r.amax)} · largest {number(r.max)}",
                    place_of(r.amax, r.max),
                    r.heights,
                    r.item,
                    stretched(r.item, r.ratio),
                ]
                for r in record.ranges
            ],
            "prepared": {
                name: "; ".join(MOVE_TEXTS.get(move, move) for move in moves)
                for name, moves in record.prepared.items()
            },
        }
    )


def script_text(value: object) -> str:
    """`value` as JSON that cannot end the script element it stands in.

    >>> script_text({"a": "</script>"})
    '{"a":"\\\\u003c/script>"}'
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def place_of(amax: float, largest: float) -> float:
    """Where amax lies on an axis of four decades up to `largest`: 0 at the left, 1 at the right.

    >>> place_of(1.0, 1.0), place_of(0.01, 1.0), place_of(1e-9, 1.0)
    (1.0, 0.5, 0.0)
    """
    if not (amax > 0 and largest > 0):
        return 0.0
    return round(min(max(1 + math.log10(amax / largest) / 4, 0.0), 1.05), 4)


def stretched(item: str, ratio: float) -> str:
    """Which picture sets the largest value, in words; nothing without one.

    >>> stretched("321", 4457.2), stretched("", 1.0)
    ('picture 321 sets the largest value, 4457 times the median', '')
    """
    if not item:
        return ""
    above = "where most have none" if math.isinf(ratio) else f"{ratio_text(ratio)} times the median"
    return f"picture {item} sets the largest value, {above}"
