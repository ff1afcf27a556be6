"""An engine's layers, as trtexec exported them, as one HTML file."""

from __future__ import annotations

from trtune.precision.backends.trt.layer_table import EngineTable
from trtune.precision.backends.trt.lints import lint_groups
from trtune.reports.page.template import template_of
from trtune.reports.summary import DASH
from trtune.reports.tables import Table


def engine_html(name: str, found: EngineTable) -> str:
    """`found` as a page called `name`: counts, findings, layers, and the nodes of the model.

    It needs nothing beside it and asks nothing of the network.
    """
    layers = found.layers
    if found.times:
        layers = tuple(sorted(layers, key=lambda layer: -found.times.get(layer.name, 0.0)))
    return template_of("engine.html.jinja").render(
        name=name,
        summary=found.summary(),
        timed=bool(found.times),
        groups=lint_groups(found.lints),
        most_lints=len(found.lints),
        layers=Table(
            ("layer", "type", "computes in", "gives", "ms"),
            tuple(
                (
                    layer.name,
                    layer.kind,
                    layer.precision,
                    layer.output,
                    _milliseconds(found.times.get(layer.name)),
                )
                for layer in layers
            ),
            text_columns=4,
        ),
        nodes=Table(
            ("node", "runs in", "ms"),
            tuple(
                (node, kind, _milliseconds(found.node_times.get(node)))
                for node, kind in found.precisions.items()
            ),
        ),
    )


def _milliseconds(value: float | None) -> str:
    return DASH if value is None else f"{value:.4g}"
