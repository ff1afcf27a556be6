"""The templates, and what turns values into the page's text."""

from __future__ import annotations

import re
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from trtune.precision.backends.trt.lints import lint_place
from trtune.reports.summary import (
    DASH,
    metric_label,
    metric_text,
    number,
    plural,
    ratio_text,
    seconds_text,
    size_text,
    tail,
)

MOVE_TEXTS = {
    "scale": "channels scaled to a common range",
    "shift": "shifted to the middle of its range",
    "round": "integer codes of the weights chosen on the data",
    "bias": "bias corrected for the error of the weights",
}
"""What `run.json` calls a move of preparation, in words."""


def template_of(name: str) -> Template:
    folder = resources.files("trtune.reports")
    loader = FunctionLoader(lambda part: folder.joinpath(part).read_text(encoding="utf-8"))
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breakable": _breakable,
        "folded": folded,
        "metric_label": metric_label,
        "move_text": lambda move: MOVE_TEXTS.get(move, move),
        "metric_text": lambda value, metric: metric_text(metric, value),
        "number": number,
        "place": lint_place,
        "ratio": ratio_text,
        "plural": plural,
        "seconds": seconds_text,
        "size": size_text,
        "tail": tail,
        "tidy": _tidy,
    }
    environment.globals["DASH"] = DASH
    return environment.get_template(name)


def _tidy(text: str) -> str:
    """`text` whose numbers stay on one line with their units, and top-1 with its 1."""
    text = re.sub(r"(?<=\d) (?=(%|dB)(\W|$))", "\N{NO-BREAK SPACE}", text)
    return re.sub(r"\btop-(?=[15]\b)", "top\N{NON-BREAKING HYPHEN}", text)


def folded(text: str) -> str:
    """A number's cell, which goes on in the next line only between what belongs together.

    >>> folded("12.3 ms (13.5)").split(" "), folded("60 INT8 + 4 FP8").split(" ")
    (['12.3\\xa0ms', '(13.5)'], ['60\\xa0INT8\\xa0+', '4\\xa0FP8'])
    """
    parts = re.split(r"(?<=[,+]) |(?<= to) | (?=\()", text)
    whole = " ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)
    return whole.replace("-", "\N{NON-BREAKING HYPHEN}")


def _breakable(name: str) -> Markup:
    """`name` that may go on in the next line after each slash."""
    return Markup("/<wbr>").join(name.split("/"))
