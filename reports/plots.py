"""Plots as SVG text to be put into an HTML page, drawn by matplotlib.

Their colours are CSS variables of the page (`--ink`, `--accent`, ...), so that one drawing is
readable on a light and on a dark page. No names of tensors or layers are drawn: they may hold any
character and any length, and the page shows them as text.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from trtune.reports.record import HistogramPlot, LayerRow, RunRecord
from trtune.reports.summary import FRACTIONS, PRECISIONS, metric_label, metric_text, target_value

# matplotlib only takes real colours; these stand for a variable until the SVG text is written
COLOURS = {
    "ink": "#010203",
    "muted": "#020304",
    "line": "#030405",
    "accent": "#040506",
    "good": "#050607",
    "warn": "#060708",
    "bad": "#070809",
    "surface": "#08090a",
    "int8": "#090a0b",
    "fp16": "#0a0b0c",
    "bf16": "#0b0c0d",
    "fp32": "#0c0d0e",
    "fp8": "#0d0e0f",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trtune",
    "font.size": 10,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.8,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.minor.visible": False,
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"],
    "legend.fontsize": 9,
}
HISTOGRAM_DECADES = 4.5
ROW = "row:"
"""A dot's address before it becomes the number of a row, which the page makes a link of."""


@contextmanager
def _axes(
    width: float, height: float, frame: tuple[float, float, float, float] | None = None
) -> Iterator[tuple[Figure, Axes]]:
    """A figure of `width` x `height` inches in the page's style.

    `frame` is where the axes stand (left, bottom, width, height, in parts of the figure); without
    it that is worked out from the labels, which means drawing them all once more.
    """
    with mpl.rc_context(STYLE):
        if frame is not None:
            figure = Figure(figsize=(width, height))
            yield figure, figure.add_axes(frame)
            return
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an `<svg>` element that can stand several times in one HTML page.

    Ids get `name` as their prefix; `label` is what a screen reader says.
    """
    buffer = io.StringIO()
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    with warnings.catch_warnings():
        # a metric's name in a script that DejaVu lacks: the browser draws the text, not matplotlib
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg {box.group() if box else ""} class="plot" role="img" aria-label="{label}">'
    text = re.sub(r"<svg[^>]*>", head, text, count=1)
    text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    text = re.sub(rf'href="{ROW}(\d+)"(?: target="[^"]*")?', r'data-layer="\1"', text)
    text = re.sub(
        r"(<a [^>]*>)\s*<g clip-path=[^>]*>\s*(<use [^>]*/>)\s*</g>\s*(</a>)", r"\1\2\3", text
    )
    text = re.sub(r">\s+<", "><", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    text = re.sub(r"font: ([^;\"']*?px) [^;\"]*", r"font: \1 var(--sans)", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def tuning_svg(record: RunRecord) -> str:
    """The metric against the number of pins, step by step; empty without finite steps."""
    steps = [step for step in record.tuning if math.isfinite(step.value)]
    if not steps:
        return ""
    metric, needed, base = record.baseline.metric, target_value(record), record.baseline.value
    scale = 100.0 if metric in FRACTIONS else 1.0
    with _axes(12.0, 4.3) as (figure, axes):
        kept = [step for step in steps if step.action != "unpin-rejected"]
        axes.plot(
            [len(s.pinned) for s in kept],
            [scale * s.value for s in kept],
            color=COLOURS["muted"],
            linewidth=1.2,
            alpha=0.55,
            zorder=2,
        )
        for step in steps:
            _draw_step(axes, len(step.pinned), scale * step.value, step.action, met=step.met)
            axes.annotate(
                str(step.step),
                (len(step.pinned), scale * step.value),
                xytext=(8, -10),
                textcoords="offset points",
                fontsize=9,
                color=COLOURS["muted"],
            )
        limits = [scale * s.value for s in steps]
        for value, text, colour, dash in (
            (needed, "target", COLOURS["warn"], (0, (5, 3))),
            (base, "FP32", COLOURS["fp32"], (0, (1, 2))),
        ):
            if value is not None:
                limits.append(scale * value)
                axes.axhline(scale * value, color=colour, linewidth=1.4, linestyle=dash, zorder=1)
                _right_label(axes, scale * value, f" {text} {metric_text(metric, value)}", colour)
        span = max(limits) - min(limits) or abs(limits[0]) or 1.0
        axes.set_ylim(min(limits) - 0.12 * span, max(limits) + 0.12 * span)
        axes.set_xlim(-0.4, max(1, *(len(s.pinned) for s in steps)) + 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        unit = {"sqnr_db": " (dB)"}.get(metric, " (%)" if metric in FRACTIONS else "")
        axes.set_ylabel(metric_label(metric) + unit)
        axes.set_xlabel("pinned nodes")
        return _svg(figure, "tuning", "Accuracy against the number of pinned nodes")


def _draw_step(axes: Axes, x: float, y: float, action: str, *, met: bool) -> None:
    colour = COLOURS["good"] if met else COLOURS["bad"]
    if action == "unpin-rejected":
        axes.plot(x, y, marker="x", markersize=7, color=colour, markeredgewidth=1.8, zorder=3)
        return
    face = COLOURS["surface"] if action == "unpin" else colour
    axes.plot(
        x,
        y,
        marker="o",
        markersize=7.5,
        linestyle="none",
        markerfacecolor=face,
        markeredgecolor=colour,
        markeredgewidth=1.8,
        zorder=4,
    )


def _right_label(axes: Axes, y: float, text: str, colour: str) -> None:
    axes.annotate(
        text,
        xy=(1.0, y),
        xycoords=("axes fraction", "data"),
        va="center",
        ha="left",
        fontsize=9,
        color=colour,
        annotation_clip=False,
    )


def profile_svg(layers: Sequence[LayerRow], pinned: frozenset[str]) -> str:
    """Accumulated SQNR of every layer in network order; empty if none was measured."""
    points = [
        (index, row.accumulated_sqnr_db, row)
        for index, row in enumerate(layers, start=1)
        if row.accumulated_sqnr_db is not None and math.isfinite(row.accumulated_sqnr_db)
    ]
    if not points:
        return ""
    with _axes(12.0, 3.6) as (figure, axes):
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        axes.plot(xs, ys, color=COLOURS["muted"], linewidth=1.0, alpha=0.5, zorder=2)
        size = 22 if len(points) <= 120 else 10
        for precision in PRECISIONS:
            own = [(x, y) for x, y, row in points if row.precision == precision]
            _dots(axes, own, precision.upper(), size=size, fill=COLOURS[precision], edge="none")
        other = [(x, y) for x, y, row in points if row.precision not in PRECISIONS]
        _dots(axes, other, "other", size=size, fill=COLOURS["muted"], edge="none")
        ringed = [(x, y) for x, y, row in points if row.node in pinned]
        _dots(axes, ringed, "pinned", size=90, fill="none", edge=COLOURS["warn"])
        axes.set_xlabel("layer, in network order")
        axes.set_ylabel("accumulated SQNR (dB)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="upper right", ncols=5, handletextpad=0.2, columnspacing=1.2)
        low, high = min(ys), max(ys)
        axes.set_ylim(low - 0.06 * (high - low + 1), high + 0.22 * (high - low + 1))
        return _svg(figure, "profile", "Accumulated SQNR of every layer in network order")


def _dots(
    axes: Axes,
    points: Sequence[tuple[int, float]],
    label: str,
    *,
    size: float,
    fill: str,
    edge: str,
) -> None:
    if points:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        drawn = axes.scatter(
            xs, ys, s=size, facecolors=fill, edgecolors=edge, linewidths=1.6, zorder=3
        )
        if edge == "none":
            drawn.set_urls([f"{ROW}{x}" for x in xs])
        axes.scatter([], [], s=30, facecolors=fill, edgecolors=edge, linewidths=1.4, label=label)


def density_per_decade(
    edges: Sequence[float], counts: Sequence[float], *, low: float, bins: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The histogram as values per decade on `bins` bins equally wide on a log axis from `low`.

    Each source bin is spread over the bins it covers in proportion to the log of its width; the
    part below `low` (zeros among it) is left out. Returns (bins + 1 edges, bins densities); empty
    arrays if nothing lies above `low`.
    """
    left = np.asarray(edges[:-1], dtype=np.float64)
    right = np.asarray(edges[1:], dtype=np.float64)
    weight = np.asarray(counts, dtype=np.float64)
    used = (right > low) & (weight > 0)
    if not used.any():
        return np.zeros(0), np.zeros(0)
    first = np.log10(np.maximum(left[used], low))
    last, weight = np.log10(right[used]), weight[used]
    whole = last - np.log10(np.maximum(left[used], low / 10))
    density = weight / np.maximum(whole, 1e-12)
    new = np.linspace(math.log10(low), float(last.max()), bins + 1)
    overlap = np.minimum(last[:, None], new[None, 1:]) - np.maximum(first[:, None], new[None, :-1])
    total = (np.maximum(overlap, 0.0) * density[:, None]).sum(axis=0)
    return 10.0**new, total / (new[1] - new[0])


def histogram_svg(plot: HistogramPlot, name: str) -> str:
    """Histogram of |x| on log axes with the chosen amax; empty for a tensor of zeros only.

    `name` makes the ids of the drawing unique in a page. The axis starts `HISTOGRAM_DECADES`
    below amax, where int8 has long rounded everything to zero.
    """
    top = max(plot.max, plot.amax)
    anchor = plot.amax if plot.amax > 0 else plot.max
    if not (top > 0 and anchor > 0):
        return ""
    low = min(anchor, top) * 10.0**-HISTOGRAM_DECADES
    edges, density = density_per_decade(plot.edges, plot.counts, low=low, bins=140)
    if not len(density) or not density.any():
        return ""
    with _axes(4.4, 2.5, (0.155, 0.195, 0.83, 0.785)) as (figure, axes):
        floor = float(density[density > 0].min()) * 0.5
        kept, cut = edges[:-1] < plot.amax, edges[:-1] >= plot.amax
        for part, colour in ((kept, COLOURS["accent"]), (cut, COLOURS["bad"])):
            heights = np.where(part & (density > 0), density, floor)
            axes.stairs(heights, edges, baseline=floor, fill=True, color=colour, alpha=0.75)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.set_ylim(floor, float(density.max()) * 6)
        axes.set_xlim(low, top * 1.4)
        if plot.amax > 0:
            _mark_amax(axes, plot.amax, to_left=plot.amax > math.sqrt(low * top) * 3)
        axes.set_xlabel("|x|")
        axes.set_ylabel("values per decade")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.grid(visible=False, axis="x")
        return _svg(figure, name, "Histogram of magnitudes with the chosen amax")


def _mark_amax(axes: Axes, amax: float, *, to_left: bool) -> None:
    axes.axvline(amax, color=COLOURS["ink"], linewidth=1.5)
    axes.annotate(
        f"amax {amax:.4g}",
        xy=(amax, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(-5 if to_left else 5, 0),
        textcoords="offset points",
        ha="right" if to_left else "left",
        va="top",
        fontsize=9,
    )
