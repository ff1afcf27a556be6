"""Method `auto`, first round: for each range the amax whose quantization hurts the output least.

The output is that of the whole network, on pictures that the histograms have not seen, with
nothing else quantized. The second round, with everything else quantized, is `company`.

A trial of a range runs the network behind it on held-out pictures. What that costs grows with the
number of ranges times the size of the network, so a large detector searches on fewer pictures, and
the largest only those ranges whose methods disagree most. It is counted in multiply-accumulates,
so that the choice is the same on any machine.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from trtune.calibrate.histogram import Histogram, quantile
from trtune.calibrate.methods import CANDIDATES
from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import Batch
from trtune.precision.compare.alone import Alone, Change, in_parallel
from trtune.precision.graph.macs import macs
from trtune.precision.graph.proto import infer_shapes, replace_field, without_weights
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.plan.placement import Edge
from trtune.precision.tune.judge import Judge, judge_of, worst

log = logging.getLogger(__name__)

APART = 0.9
"""Candidates closer than this to a larger one are not tried."""

STRIDE = 1.2
"""From the best candidate, steps by this factor up or down as long as they help."""

SCREENED = 8
"""Pictures, at least, that sort out the hopeless: one alone says little about the others."""

HOPELESS = 1.5
"""What is this many times worse than the best on the screened pictures is given up."""

WITHIN = 1.1
"""What is this many times worse than the best on the first half is not tried on the others."""

CERTAINLY = 1 + 1e-9
"""How far above a bound a sum has to be: not by its rounding alone."""

FINALISTS = 2

SURPRISE = 1.25
"""If all pictures show this many times the error of the first ones, all of them lead the search."""

USUAL = 0.9
"""The part of the pictures whose maxima a range holds, unless it is shown that it need not."""

REACHES = 0.8
"""A picture that comes this near to that limit is one to show it on."""

WITNESSES = 3
"""Pictures, at least, to show it on."""


Named = tuple[str, float]
"""A method, and the factor from its amax to another."""


SEARCH = 600_000_000_000
"""Multiply-accumulates that trying one amax for every range may take, on all pictures together.

An EfficientNet-B0 of 0.4 GMAC and 82 ranges takes 21 of these billions a picture, a detector of
3.3 GMAC and 93 ranges 101.
"""
FEWEST = 4
"""Pictures that a search uses in any case, where there are so many."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The amax chosen for a range, which method it is (or near to), and its output error.

    `factor` is the amax by that of the method, 1 where they are the same. `error` is that of the
    worst output, as `judge.worst` has it.
    """

    amax: float
    method: str
    error: float
    factor: float = 1.0


def nearest_name(amax: float, names: Mapping[float, Named]) -> Named:
    """How to call an amax that no method gave: the nearest method and the factor.

    >>> nearest_name(1.25, {1.0: ("mse", 1.0), 4.0: ("max", 1.0)})
    ('mse', 1.25)
    """
    named = {known: name for known, (name, factor) in names.items() if factor == 1}
    known = min(named, key=lambda other: abs(np.log(amax / other)))
    return named[known], amax / known


def choose_by_output(
    alone: Alone,
    histograms: Mapping[str, Histogram],
    readers: Mapping[str, Mapping[str, tuple[Edge, ...]]],
    *,
    progress: Progress = silent,
) -> dict[str, Choice]:
    """For each range the best amax, measured at the output on the pictures that `alone` holds.

    `readers` maps a range (a key of `histograms`) to its tensors and the edges that read each of
    them quantized; all tensors of a range are quantized together with one amax. Tried are the
    methods of `CANDIDATES`, those that differ by 10 % at least, then steps of 20 % from the best
    one as long as they help. At least `SCREENED` pictures sort out the hopeless, the first half
    leads the steps, all decide; where all pictures show a clearly larger error than the first half
    did, all of them lead. An amax that a tenth of the calibration pictures exceed is taken only if
    it is better on at least `WITNESSES` of the pictures here that are such. Errors are those of
    the worst output (see `Judge`).
    """
    with_scale = [n for n in readers if np.float32(histograms[n].maximum) / np.float32(127) > 0]
    choices = {name: Choice(0.0, "max", 0.0) for name in readers}
    judge = judge_of(alone)

    def best(name: str) -> Choice:
        trials = _Trials(alone, judge, readers[name])
        with trials:
            return _choose(trials, distinct_candidates(histograms[name]), histograms[name])

    found = in_parallel(
        best, with_scale, what="choose ranges", workers=alone.trials_at_once, progress=progress
    )
    choices.update(zip(with_scale, found, strict=True))
    return choices


def _choose(trials: _Trials, candidates: dict[float, str], histogram: Histogram) -> Choice:
    half, whole = max(-(-trials.batches // 2), trials.screening), trials.batches
    names: dict[float, Named] = {amax: (name, 1.0) for amax, name in candidates.items()}
    chosen = _search(trials, names, histogram.maximum, leading=half, screening=trials.screening)
    seen = min(trials.error(chosen, part) for part in (trials.screening, half))
    if trials.error(chosen, whole) > SURPRISE * seen:
        # Some picture that did not lead is unlike those that did: let all lead.
        trials.weigh(chosen)
        chosen = _search(trials, names, histogram.maximum, leading=whole, screening=whole)
    usual = min(quantile(histogram.pictures.counts, USUAL), histogram.maximum)
    if 0 < chosen < usual and not _is_shown(trials, chosen, usual):
        names.setdefault(usual, (f"percentile-{100 * USUAL:g} of the pictures' maxima", 1.0))
        allowed = [amax for amax in names if amax >= usual]
        chosen = trials.best(allowed, whole, count=1, within=1.0)[0]
    method, factor = names[chosen]
    return Choice(chosen, method, trials.error(chosen, whole), factor)


def _is_shown(trials: _Trials, amax: float, usual: float) -> bool:
    """Whether pictures that reach `usual` are better off with the smaller `amax`."""
    reach = [trials.maxima(b) >= REACHES * usual for b in range(trials.batches)]
    if sum(map(np.count_nonzero, reach)) < WITNESSES:
        return False
    batches = [b for b, pictures in enumerate(reach) if pictures.any()]
    smaller, larger = (
        worst([errors[:, reach[b]] for b, errors in zip(batches, found, strict=True)])
        for found in (trials.on(value, batches) for value in (amax, usual))
    )
    return smaller <= larger


def _search(
    trials: _Trials, names: dict[float, Named], limit: float, *, leading: int, screening: int
) -> float:
    """The best of `names` and of what steps from it reach, led by the first `leading` batches.

    What is hopeless on the first `screening` of those is not tried on the others. Adds the
    amaxes that it tries to `names`.
    """
    promising = list(names)
    if leading > screening:
        promising = trials.best(promising, screening, count=len(names), within=HOPELESS)
    # What may be among the finalists is tried on all that lead.
    slack = WITHIN if leading < trials.batches else 1.0
    best = trials.best(promising, leading, count=1, within=1.0, near=slack)[0]

    def better(amax: float, than: float) -> bool:
        names.setdefault(amax, nearest_name(amax, names))
        hopeless = HOPELESS * trials.error(than, screening)
        if trials.error(amax, screening, most=hopeless) > hopeless:
            return False
        now = trials.error(than, leading)
        return trials.error(amax, leading, most=slack * now) < now

    best = _climb(best, STRIDE, limit, better)
    tried = [amax for amax in names if trials.has(amax, leading)]
    finalists = trials.best(tried, leading, count=FINALISTS, within=WITHIN)
    return trials.best(finalists, trials.batches, count=1, within=1.0)[0]


class _Trials:
    """The output error of each amax tried, on as many batches as were asked for so far.

    More can be asked for inside `with`.
    """

    def __init__(self, alone: Alone, judge: Judge, tensors: Mapping[str, tuple[Edge, ...]]) -> None:
        edges = tuple(edge for readers in tensors.values() for edge in readers)
        self._alone, self._judge, self._tensors = alone, judge, tuple(tensors)
        self._change = Change(edges)
        self._found: dict[float, dict[int, NDArray[np.float64]]] = {}
        self.batches = alone.batches
        self._pictures = [alone.pictures(b) for b in range(alone.batches)]
        self._loudest = list(range(alone.batches))
        self.screening = screening_batches(self._pictures)

    def __enter__(self) -> None:
        self._run = self._alone.session(self._change, int8=True)

    def __exit__(self, *reason: object) -> None:
        del self._run  # a session holds the weights of what comes after the tensors

    def has(self, amax: float, batches: int) -> bool:
        """Whether `amax` was tried on all of the first `batches`."""
        return all(b in self._found.get(amax, {}) for b in range(batches))

    def maxima(self, batch: int) -> NDArray[np.float64]:
        """The largest |x| of each picture of a batch; of all together if rows are no pictures."""
        pictures = self._pictures[batch]
        found = np.zeros(pictures)
        for tensor in self._tensors:
            values = np.abs(self._alone.stored(batch, tensor))
            rows = values.reshape(pictures if len(values) == pictures else 1, -1)
            found = np.maximum(found, rows.max(axis=1, initial=0))
        return found

    def error(self, amax: float, batches: int, *, most: float = math.inf) -> float:
        """Mean over the pictures of the first `batches` of the worst output's relative noise;
        infinity as soon as it is certain to be above `most`.

        Errors are never below zero, so that a part of the sum can tell. The batches go by what
        they were found to weigh, the heaviest first.
        """
        found = self._found.setdefault(amax, {})
        pictures = sum(self._pictures[:batches])
        so_far = [errors for b, errors in found.items() if b < batches]
        for batch in self._loudest:
            if batch >= batches or batch in found:
                continue
            if so_far and _summed(so_far) > CERTAINLY * most * pictures:
                return math.inf
            so_far += self.on(amax, [batch])
        return worst([found[b] for b in range(batches)])

    def weigh(self, amax: float) -> None:
        """Let the batches go by the errors of `amax`, which was tried on all, from now on."""
        self._loudest.sort(key=lambda b: -_summed([self._found[amax][b]]))

    def on(self, amax: float, batches: Sequence[int]) -> list[NDArray[np.float64]]:
        """The errors on these batches, each of shape (groups, pictures)."""
        found = self._found.setdefault(amax, {})
        scale = float(np.float32(amax) / np.float32(127))
        for batch in batches:
            if batch not in found:
                changed = {t: self._alone.through(batch, t, scale) for t in self._tensors}
                found[batch] = self._judge.errors(batch, self._run(batch, changed))
        return [found[batch] for batch in batches]

    def best(
        self, amaxes: Iterable[float], batches: int, *, count: int, within: float, near: float = 1.0
    ) -> list[float]:
        """The best `count` of `amaxes` on some batches, none `within` times worse than the best.

        What is certainly not among them, nor `near` times as bad at most, is tried no further.
        """
        known: dict[float, float] = {}
        for amax in sorted(amaxes, key=lambda a: (self._guess(a), a)):
            ranked = sorted(known.values())
            most = within * ranked[0] if ranked else math.inf
            most = min(most, ranked[count - 1]) if len(ranked) >= count else most
            known[amax] = self.error(amax, batches, most=near * most)
        found = sorted(known, key=lambda amax: (known[amax], amax))
        return [amax for amax in found[:count] if known[amax] <= within * known[found[0]]]

    def _guess(self, amax: float) -> float:
        """The mean error on what `amax` was tried on; zero if on nothing."""
        found = self._found.get(amax)
        return worst(list(found.values())) if found else 0.0


def _summed(errors: list[NDArray[np.float64]]) -> float:
    """The sum over pictures of the group that has most."""
    return float(np.sum([part.sum(axis=1) for part in errors], axis=0).max())


def screening_batches(pictures: list[int]) -> int:
    """The first batches that hold `SCREENED` pictures together, or all.

    >>> screening_batches([4, 4, 4]), screening_batches([1, 1]), screening_batches([24])
    (2, 2, 1)
    """
    enough = int(np.searchsorted(np.cumsum(pictures), SCREENED)) + 1
    return min(enough, len(pictures))


def _climb(
    start: float, stride: float, limit: float, better: Callable[[float, float], bool]
) -> float:
    """Walk up, or else down, by a factor as long as it gets better; at most up to `limit`."""
    for factor in (stride, 1 / stride):
        best = start
        while (onward := min(best * factor, limit)) != best and better(onward, best):
            best = onward
        if best != start:
            return best
    return start


def distinct_candidates(histogram: Histogram) -> dict[float, str]:
    """amax -> method for the candidates that differ, largest first."""
    found: dict[float, str] = {}
    candidates = {name: method(histogram) for name, method in CANDIDATES.items()}
    for name, amax in sorted(candidates.items(), key=lambda entry: (-entry[1], entry[0])):
        if amax > 0 and all(amax < APART * other for other in found):
            found[amax] = name
    return found


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
