"""How much a search may compute: counted in multiply-accumulates, so that it is the same anywhere.

A trial of a range runs the network behind it on held-out pictures. What that costs grows with the
number of ranges times the size of the network, so large detectors search on fewer pictures, and
the largest only those ranges whose methods disagree most.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import onnx

from trtune.calibrate.histogram import Histogram
from trtune.datasets.batches import Batch
from trtune.precision.graph.inference import infer_shapes
from trtune.precision.graph.macs import macs
from trtune.precision.graph.proto import replace_field, without_weights
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.tune.ranges import distinct_candidates

log = logging.getLogger(__name__)

SEARCH = 600_000_000_000
"""Multiply-accumulates that trying one amax for every range may take, on all pictures together.

An EfficientNet-B0 of 0.4 GMAC and 82 ranges takes 21 of these billions a picture, a detector of
3.3 GMAC and 93 ranges 101.
"""
FEWEST = 4
"""Pictures that a search uses in any case, where there are so many."""


def trial_macs(
    model: Model, view: GraphView, ranges: Mapping[str, Iterable[str]], batch: Batch
) -> dict[str, int]:
    """Multiply-accumulates of the nodes behind the tensors of each range, for a sample of `batch`.

    Dimensions are those that the network has for `batch`, as far as they can be inferred.
    """
    sized = _sized(model, view, batch)
    work = {node.name: macs(sized, node.name) for node in sized.nodes}
    work = {name: max(count, macs(view, name)) for name, count in work.items()}
    return {
        name: sum(work[node] for node in view.descendants(tensors))
        for name, tensors in ranges.items()
    }


def _sized(model: Model, view: GraphView, batch: Batch) -> GraphView:
    """`view` with free dimensions as `batch` fills them."""
    free = [s for s in model.inputs if any(not isinstance(dim, int) for dim in s.shape)]
    if not free:
        return view
    light = without_weights(model.proto)
    for info in light.graph.input:
        if info.name in batch.feeds:
            dims = batch.feeds[info.name].shape
            replace_field(info.type.tensor_type.shape.dim, [_dim(d) for d in dims])
    replace_field(light.graph.value_info, [])
    for output in light.graph.output:
        output.type.tensor_type.ClearField("shape")
    infer_shapes(light)
    return GraphView(light)


def _dim(value: int) -> onnx.TensorShapeProto.Dimension:
    return onnx.TensorShapeProto.Dimension(dim_value=value)


def pictures_within(costs: Mapping[str, int], wanted: int) -> int:
    """`wanted`, or as many fewer pictures as `SEARCH` allows, but not below `FEWEST`.

    >>> pictures_within({"a": SEARCH // 10, "b": SEARCH // 10}, 16)
    5
    >>> pictures_within({"a": 2 * SEARCH}, 16), pictures_within({"a": 2 * SEARCH}, 2)
    (4, 2)
    """
    each = max(sum(costs.values()), 1)
    return max(min(wanted, SEARCH // each), min(wanted, FEWEST))


def ranges_within(
    costs: Mapping[str, int], histograms: Mapping[str, Histogram], pictures: int
) -> frozenset[str]:
    """The ranges of `costs` that are searched on so many `pictures`: all that `SEARCH` allows.

    Where it does not allow all, first those whose methods are furthest apart.
    """
    if sum(costs.values()) * pictures <= SEARCH:
        return frozenset(costs)
    spread = {name: _spread(histograms[name]) for name in costs}
    left, taken = SEARCH, []
    for name in sorted(costs, key=lambda n: (-spread[n], n)):
        cost = costs[name] * pictures
        if cost <= left:
            taken.append(name)
            left -= cost
    log.info("ranges: %d of %d searched, to end in time", len(taken), len(costs))
    return frozenset(taken)


def _spread(histogram: Histogram) -> float:
    """The largest amax of a method by the smallest."""
    amaxes = distinct_candidates(histogram)
    return max(amaxes) / min(amaxes) if amaxes else 1.0
