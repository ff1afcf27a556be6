"""What a candidate is worth: one streaming pass over data with a measure and a reference."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trtune.configs.errors import DataError, did_you_mean
from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import Batch, BatchSource
from trtune.precision.runtime.errors import NotFiniteError
from trtune.precision.runtime.output_groups import OutputGroup
from trtune.reports.measures.base import (
    AgainstReference,
    Measure,
    Outputs,
    PythonMetric,
    metric_name,
    named_output,
)
from trtune.reports.measures.fidelity import (
    FIDELITY_METRICS,
    Fidelity,
    agreeing_output,
    agreement,
    class_rows,
    cosine,
    sqnr_db,
)
from trtune.reports.measures.find import METRICS, Asked, make_measure
from trtune.reports.measures.recognise import task_of
from trtune.reports.measures.uncertainty import (
    is_mixed,
    misses_for_good,
    paired_error,
    share_error,
    sqnr_error,
    standard_error,
)
from trtune.reports.outputs import Answers, Layout, Run, StoredOutputs, answers, each_answers

log = logging.getLogger(__name__)

NUMBERS = "biuf"
"""NumPy's kinds of arrays that have a distance; texts have none."""


@dataclass(frozen=True, slots=True)
class OutputCloseness:
    """How close one output is to FP32's; `left_out` samples had another shape."""

    sqnr_db: float
    cosine: float
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a candidate is worth on one source.

    `value` is that of the metric asked for (None if none was) and `error` its standard error;
    `difference_error` that of the difference to the reference, on the same samples; `output` the
    output that was scored, where the metric chose one. `sqnr_error` is the standard error of
    `sqnr_db` over samples, in decibels. It is not `whole` if the pass ended early. The others
    compare with the reference and
    are None without one; `agreement` is also None where no output is class scores. `sqnr_db` and
    `cosine` are those of the worst output, `outputs` has them all.
    """

    metric: str | None
    value: float | None
    samples: int
    sqnr_db: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    error: float | None = None
    difference_error: float | None = None
    output: str | None = None
    outputs: Mapping[str, OutputCloseness] = field(default_factory=dict)
    sqnr_error: float | None = None
    agreement_error: float | None = None
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Needed:
    """What a pass has to reach: ended early, as soon as the rest of the samples cannot change that
    it misses.

    `value` is of the metric, more is better, or where it is said of `closeness` (sqnr_db, cosine or
    agreement) that is measured beside it; `baseline` is the reference's own value over all samples.
    """

    value: float
    baseline: float | None = None
    closeness: str | None = None


Metric = str | PythonMetric | Callable[[], Any]


def evaluate(
    run: Run | StoredOutputs,
    source: BatchSource,
    *,
    metric: Metric | None = None,
    reference: Run | StoredOutputs | None = None,
    output: str | None = None,
    outputs: Sequence[str] = (),
    asked: Asked | None = None,
    layout: Layout | None = None,
    fixed_batch: int | None = None,
    at_once: int = 1,
    needed: Needed | None = None,
    progress: Progress = silent,
    what: str = "evaluate",
) -> Evaluation:
    """One pass over `source`: the value of `metric`, and closeness to `reference` if there is one.

    `run` is the candidate, or its answers kept before.

    `metric` is a name of `METRICS`, a function or a class as `trtune.reports.measures.base`
    describes, or None for closeness alone. `output` names the output that is scored, and the only
    one that is compared with the reference unless `outputs` names those; by default the metric
    takes the output that fits the labels, and all are compared. `asked` has the metric's further
    settings; `at_once` is as `each_answers` has it. With `needed` the pass may end early, if
    `reference` is kept answers. Sums are float64; of the outputs nothing is kept.

    Raises DataError if labels are missing or not a class of the model, if the source is empty, or
    if the reference's outputs are not finite, naming the item; ModelError if the output is missing
    or none fits; ValueError if `metric` is unknown, or needs a reference and there is none.
    """
    if isinstance(metric, str) and metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}{did_you_mean(metric, METRICS)}")
    asked = asked or Asked(output=output)
    pair = _Pair(_own_agreement(metric, layout), asked, has_reference=reference is not None)
    sums, spread, samples, whole = Fidelity(), _Spread(), 0, True
    progress(what, 0, source.count)
    passed = _each_answers(run, source, fixed_batch, layout, at_once)
    with closing(passed):
        for batch, found in passed:
            if asked.output is not None:
                named_output(found.everything, asked.output)
            expected = None
            if reference is not None:
                expected = _answers(reference, batch, samples, fixed_batch, layout)
                names = outputs or ([asked.output] if asked.output else ())
                groups = reference.groups if isinstance(reference, StoredOutputs) else ()
                sums = _compare(sums, expected, found, names, asked.output, batch, groups, spread)
            pair.update(found.everything, None if expected is None else expected.everything, batch)
            samples += len(batch)
            progress(what, samples, source.count)
            if needed is not None and isinstance(reference, StoredOutputs):
                total = len(reference.items)
                look = samples.bit_length() > (samples - len(batch)).bit_length()
                if samples < total and _misses(
                    metric, pair, sums, samples, needed, reference, look=look
                ):
                    whole = False
                    log.info(
                        "%s: the rest cannot meet the target after %d of %d", what, samples, total
                    )
                    break
    if not samples:
        raise DataError(f"{what}: the data is empty; there is nothing to evaluate")
    worth = _evaluation(metric, pair, sums, spread, samples, compared=reference is not None)
    return worth if whole else replace(worth, whole=False)


def _misses(
    metric: Metric | None,
    pair: _Pair,
    sums: Fidelity,
    samples: int,
    needed: Needed,
    reference: StoredOutputs,
    *,
    look: bool,
) -> bool:
    """Whether the samples to come cannot bring the metric to what is needed.

    For certain: noise only grows, and of a share what was missed stays missed. With a `look`, a
    mean also by its spread, where the samples come in mixed order.
    """
    total, measure = len(reference.items), pair.measure
    if needed.closeness is not None:
        metric, measure = needed.closeness, None
    if _most(metric, measure, sums, samples, reference) < needed.value:
        return True
    scores = getattr(measure, "scores", None)
    if scores is None or len(scores) != samples or not look:
        return False
    least, theirs = needed.value, getattr(pair.reference, "scores", None)
    if theirs is not None and needed.baseline is not None and len(theirs) == samples:
        scores, least = scores - theirs, needed.value - needed.baseline
    if not misses_for_good(scores, total, least):
        return False
    return any(
        is_mixed(rows.reshape(total, -1).astype(np.float64), samples)
        for rows in reference.outputs.values()
        if not isinstance(rows, tuple) and len(rows) == total and rows.dtype.kind == "f"
    )


def _most(
    metric: Metric | None, measure: Any, sums: Fidelity, samples: int, reference: StoredOutputs
) -> float:
    """The highest value of the metric that is still possible over all samples."""
    total = len(reference.items)
    if measure is not None:
        most = getattr(measure, "most", None)
        return float(most(total)) if callable(most) else math.inf
    if metric == "agreement" and sums.compared == samples:
        return (sums.agreeing + total - samples) / total
    if metric != "sqnr_db":
        return math.inf
    return min(
        (
            10 * math.log10(reference.energies[name] / found.noise)
            for name, found in sums.judged.items()
            if found.noise > 0 and reference.energies.get(name, 0.0) > 0
        ),
        default=math.inf,
    )


class _Spread:
    """Signal and noise of every sample, by what is judged."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[Any, Any]]] = {}

    def add(self, name: str, expected: Any, found: Any) -> None:
        """A row a sample, as sums over the elements that are finite in both."""
        if expected.dtype.kind != "f" or not len(expected):
            return
        shape = (len(expected), -1)
        exact = expected.reshape(shape) if expected.size else np.zeros((len(expected), 1))
        test = found.reshape(shape) if found.size else exact
        with np.errstate(invalid="ignore", over="ignore"):
            error = exact - test
            if not np.isfinite(error).all():
                finite = np.isfinite(error)
                exact, error = np.where(finite, exact, 0), np.where(finite, error, 0)
        rows = (_energy(exact), _energy(error))
        self._rows.setdefault(name, []).append(rows)

    def error(self, name: str | None) -> float | None:
        """The standard error of the SQNR of what is called `name`, in decibels."""
        found = self._rows.get(name or "", [])
        if not found:
            return None
        signal, noise = (np.concatenate(part) for part in zip(*found, strict=True))
        return sqnr_error(signal, noise)


def _energy(rows: Any) -> Any:
    return np.einsum("ij,ij->i", rows, rows, dtype=np.float64)


def _own_agreement(metric: Metric | None, layout: Layout | None) -> Metric | None:
    """`agreement` as the measure of the model's task: detections, pixels or tokens."""
    task = task_of(layout.inputs, layout.outputs) if layout and metric == "agreement" else None
    return task.agreement if task is not None and task.kind != "classification" else metric


class _Pair:
    """A measure, and the same on the reference, for the error of their difference."""

    def __init__(self, metric: Metric | None, asked: Asked, *, has_reference: bool) -> None:
        closeness = metric is None or (isinstance(metric, str) and metric in FIDELITY_METRICS)
        self.measure = None if closeness or metric is None else make_measure(metric, asked)
        against = isinstance(self.measure, AgainstReference)
        if not has_reference and (against or (closeness and metric is not None)):
            raise ValueError(f"metric {metric!r} compares with a reference, and none was given")
        twin = has_reference and isinstance(metric, str) and self.measure and not against
        self.reference = make_measure(metric, asked) if twin and metric is not None else None
        for made in (self.measure, self.reference):
            if made is not None:
                made.start()

    def update(self, found: Outputs, expected: Outputs | None, batch: Batch) -> None:
        if isinstance(self.measure, AgainstReference):
            assert expected is not None
            self.measure.update_pair(expected, found, batch)
        elif isinstance(self.measure, Measure):
            self.measure.update(found, batch)
        if isinstance(self.reference, Measure) and expected is not None:
            self.reference.update(expected, batch)


def _evaluation(
    metric: Metric | None,
    pair: _Pair,
    sums: Fidelity,
    spread: _Spread,
    samples: int,
    *,
    compared: bool,
) -> Evaluation:
    measure = pair.measure
    judged = {name: found.sqnr_db for name, found in sums.judged.items()}
    worst = min(judged, key=lambda name: judged[name]) if judged else None
    near = None if sums.not_finite else spread.error(worst)
    error = None if measure is None else standard_error(measure)
    if metric == "sqnr_db":
        error = near
    elif metric == "agreement" and measure is None and sums.compared:
        error = share_error(agreement(sums), sums.compared)
    value: float | None = None if measure is None else measure.result()
    if isinstance(metric, str) and metric in FIDELITY_METRICS and measure is None:
        value = FIDELITY_METRICS[metric](sums)
    if sums.not_finite:
        log.warning("%d elements of the outputs are NaN or Inf", sums.not_finite)
    for name, count in sums.left_out.items():
        log.info("output %r: %d samples have another shape than FP32's", name, count)
    both = measure is not None and pair.reference is not None
    return Evaluation(
        metric=metric if isinstance(metric, str) or metric is None else metric_name(metric),
        value=value,
        samples=samples,
        sqnr_db=sqnr_db(sums) if compared and sums.outputs else None,
        agreement=value if metric == "agreement" else agreement(sums) if sums.compared else None,
        cosine=cosine(sums) if compared and sums.outputs else None,
        error=error,
        difference_error=paired_error(pair.reference, measure) if both else None,
        output=getattr(measure, "chosen", None),
        outputs={
            name: OutputCloseness(found.sqnr_db, found.cosine, sums.left_out.get(name, 0))
            for name, found in sums.outputs.items()
        },
        sqnr_error=near if compared else None,
        agreement_error=share_error(agreement(sums), sums.compared) if sums.compared else None,
    )


def _each_answers(
    run: Run | StoredOutputs,
    source: BatchSource,
    fixed_batch: int | None,
    layout: Layout | None,
    at_once: int,
) -> Generator[tuple[Batch, Answers], None, None]:
    if not isinstance(run, StoredOutputs):
        yield from each_answers(
            run, source, fixed_batch=fixed_batch, layout=layout, at_once=at_once
        )
        return
    samples = 0
    for batch in source:
        yield batch, _answers(run, batch, samples, fixed_batch, layout)
        samples += len(batch)


def _answers(
    run: Run | StoredOutputs,
    batch: Batch,
    start: int,
    fixed_batch: int | None,
    layout: Layout | None,
) -> Answers:
    if not isinstance(run, StoredOutputs):
        return answers(run, batch, fixed_batch=fixed_batch, layout=layout)
    stop = start + len(batch)
    if run.items[start:stop] != batch.items:
        raise ValueError(
            f"the stored reference was collected from other data: sample {start} is "
            f"{batch.items[0]!r} here and {run.items[start : start + 1]} there"
        )
    return Answers(run.rows(start, stop))


def _compare(
    sums: Fidelity,
    expected: Answers,
    found: Answers,
    names: Sequence[str],
    output: str | None,
    batch: Batch,
    groups: Sequence[OutputGroup],
    spread: _Spread,
) -> Fidelity:
    parts = {name: [group for group in groups if group.output == name] for name in found.samples}
    for name in names or found.samples:
        mine = named_output(found.everything, name)
        if name not in expected.everything:
            raise ValueError(f"output {name!r} has no such output in the reference to compare with")
        for group in parts.get(name) or [OutputGroup(name)]:
            sums = _compare_output(sums, spread, group, expected.everything[name], mine, batch)
    scored = agreeing_output(found.samples, output)
    if scored is not None and scored in expected.samples:
        mine, theirs = (class_rows(a.samples[scored], scored) for a in (found, expected))
        if mine.shape == theirs.shape:
            sums = sums.add_classes(theirs, mine)
    return sums


def _compare_output(
    sums: Fidelity,
    spread: _Spread,
    group: OutputGroup,
    expected: Any,
    found: Any,
    batch: Batch,
) -> Fidelity:
    name = group.label
    first = next(iter(expected), None) if isinstance(expected, tuple) else expected
    if first is not None and first.dtype.kind not in NUMBERS:
        return sums  # names of classes, say
    if not isinstance(expected, tuple) and not isinstance(found, tuple):
        if expected.shape == found.shape:
            theirs, mine = group.of(expected), group.of(found)
            if len(theirs) == len(batch):
                spread.add(name, theirs, mine)
            return _added(sums, name, theirs, mine, batch.items)
        if expected.shape[:1] != found.shape[:1]:
            return sums.add_left_out(name, len(batch))
    for row, (theirs, mine) in enumerate(zip(expected, found, strict=True)):
        if theirs.shape == mine.shape:
            spread.add(name, theirs[np.newaxis], mine[np.newaxis])
            sums = _added(sums, name, theirs, mine, batch.items[row : row + 1])
        else:
            sums = sums.add_left_out(name, 1)
    return sums


def _added(sums: Fidelity, name: str, expected: Any, found: Any, items: Sequence[str]) -> Fidelity:
    try:
        return sums.add(name, expected, found)
    except NotFiniteError as error:
        item = items[error.index * len(items) // expected.size]
        raise DataError(
            f"the FP32 model's output {name!r} holds {error.value} for {item!r}; nothing can "
            "be compared with that. Check that item and the model"
        ) from error
