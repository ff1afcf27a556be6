"""The templates, and what turns values into the page's text."""

from __future__ import annotations

import re
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

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
        "metric_label": metric_label,
        "move_text": lambda move: MOVE_TEXTS.get(move, move),
        "metric_text": lambda value, metric: metric_text(metric, value),
        "number": number,
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


def _breakable(name: str) -> Markup:
    """`name` that may go on in the next line after each slash."""
    return Markup("/<wbr>").join(name.split("/"))
