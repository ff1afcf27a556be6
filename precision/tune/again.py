"""Ranges of a model whose channels were moved: from those it had, in company of its new codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trtune.calibrate.histogram import Histogram
from trtune.calibrate.methods import amax_mse
from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import Batch, BatchSource
from trtune.precision.compare.batches import exact_outputs
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.plan.placement import Placement, place, without_zero_ranges
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.prepare.codes import with_codes
from trtune.precision.prepare.values import Codes, Moved
from trtune.precision.tune.auto.company import Company
from trtune.precision.tune.auto.ranges import Choice
from trtune.precision.tune.auto.search import choices_table, range_limits
from trtune.precision.tune.moments import rounded_weights
from trtune.precision.tune.preparing import Move
from trtune.precision.tune.scales import Calibrated

MOVED = "moved"
"""The method of a range that was chosen with its scale and shift."""


class Again:
    """What method `auto` does for a rewritten model in place of its search from the start.

    A moved tensor starts with the amax that it was moved with, one that only carries factors of
    others with its least square error, as far from it as it was before, every other one as it is in
    `base`. Weights are rounded on that (`kinds`; nothing if empty), and all ranges tried
    once more in company of their codes, which are in `codes` then.
    """

    def __init__(
        self,
        model: Model,
        base: Calibrated,
        moves: Sequence[Move],
        moved: Sequence[Moved],
        seen: BatchSource,
        *,
        kinds: Sequence[str],
        memory: int,
        device: str = "cpu",
        progress: Progress = silent,
    ) -> None:
        self._model, self._base, self._seen = model, base, seen
        names = {done.tensor: done.name for done in moved}
        self._amaxes = {names[m.affine.tensor]: m.amax for m in moves if m.affine.tensor in names}
        self._kinds, self._memory, self._device, self._progress = kinds, memory, device, progress
        self.codes: Mapping[str, Codes] = {}

    def ranges(
        self,
        view: GraphView,
        plan: PrecisionPlan,
        placement: Placement,
        roots: Mapping[str, str],
        pictures: Sequence[Batch],
        histograms: Mapping[str, Histogram],
    ) -> dict[str, Choice]:
        """As `scales.auto_ranges`."""
        tensors: dict[str, list[str]] = {}
        for tensor in placement.activations:
            tensors.setdefault(roots[tensor], []).append(tensor)
        choices = {n: self._start(n, held, histograms[n]) for n, held in tensors.items()}
        table = choices_table({tensor: choices[root] for tensor, root in roots.items()}, None)
        plan = without_zero_ranges(view, plan, table)
        if self._kinds:
            self.codes = rounded_weights(
                self._model, plan, table, self._seen,
                kinds=self._kinds, memory=self._memory, device=self._device,
                progress=self._progress,
            )  # fmt: skip
        placed = set(place(view, plan).activations)
        ranges = {n: [t for t in held if t in placed] for n, held in tensors.items()}
        ranges = {n: held for n, held in ranges.items() if held}
        if not ranges:
            return choices
        references = exact_outputs(self._model, pictures, device=self._device)
        coded = with_codes(self._model, plan, self.codes)
        company = Company(coded, plan, table, ranges, pictures, references, device=self._device)
        limits = {n: range_limits(histograms[n], choices[n].amax) for n in ranges}
        return company.round(choices, limits, progress=self._progress)

    def _start(self, root: str, tensors: Sequence[str], histogram: Histogram) -> Choice:
        moved = [self._amaxes[t] for t in tensors if t in self._amaxes]
        if moved:
            return Choice(max(moved), MOVED, 0.0)
        before = self._base.histograms.get(root)
        scale = self._base.table.scales.get(root, self._base.table.scales.get(tensors[0]))
        if before is None or scale is None or before.maximum <= 0:
            return Choice(amax_mse(histogram), "mse", 0.0)
        method = self._base.table.methods.get(tensors[0], "mse")
        amax = float(scale) * 127
        if np.isclose(before.maximum, histogram.maximum, rtol=1e-4):
            return Choice(amax, method, 0.0)
        return Choice(amax * amax_mse(histogram) / amax_mse(before), "mse", 0.0)
