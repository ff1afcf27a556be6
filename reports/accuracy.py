"""What a candidate is worth: one streaming pass over data with a metric and a reference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import DataError, ModelError, TrtuneError, did_you_mean
from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import (
    Batch,
    BatchSource,
    check_labels,
    fit_batch,
    labels_of,
    take_rows,
)
from trtune.precision.runtime.errors import NotFiniteError
from trtune.reports.metrics import (
    FIDELITY_METRICS,
    METRICS,
    TASK_METRICS,
    Array,
    Fidelity,
    Outputs,
    PythonMetric,
    agreement,
    class_scores,
    cosine,
    metric_name,
    sqnr_db,
)

log = logging.getLogger(__name__)

Run: TypeAlias = Callable[[Mapping[str, Array]], Outputs]


@dataclass(frozen=True, slots=True)
class StoredOutputs:
    """A model's outputs for every sample of a source, kept to compare candidates with.

    `outputs` maps output name to an array with the sample axis first (the model's own dtype);
    `items` names the samples in the order of that axis.
    """

    outputs: Mapping[str, Array]
    items: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of memory the arrays take."""
        return sum(array.nbytes for array in self.outputs.values())


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a candidate is worth on one source.

    `value` is that of the metric asked for (None if none was); the other three compare with the
    reference and are None without one; `agreement` is also None where no output is class scores.
    """

    metric: str | None
    value: float | None
    samples: int
    sqnr_db: float | None = None
    agreement: float | None = None
    cosine: float | None = None


def run_batch(run: Run, batch: Batch, *, fixed_batch: int | None = None) -> dict[str, Array]:
    """The outputs of `run` for one batch, the sample axis first.

    With `fixed_batch` the samples go in by as many as the model takes; the last portion is filled
    up with its own last sample and the surplus outputs are dropped. Outputs that are not numbers,
    or do not hold one entry a sample, cannot be compared sample by sample and are left out.

    Raises ModelError if no output is left.
    """
    size = len(batch)
    step = fixed_batch or size
    portions: list[Outputs] = []
    for start in range(0, size, step):
        portion = fit_batch(take_rows(batch, slice(start, start + step)), step)
        portions.append(run(portion.feeds))
    joined = {}
    for name in portions[0]:
        parts = [np.asarray(portion[name]) for portion in portions]
        if any(p.shape[:1] != (step,) or p.dtype.kind not in "fiub" for p in parts):
            log.debug("output %r is left out: shape %s for %d samples", name, parts[0].shape, step)
            continue
        joined[name] = (parts[0] if len(parts) == 1 else np.concatenate(parts))[:size]
    if not joined:
        found = ", ".join(f"{n!r} {np.asarray(a).shape}" for n, a in portions[0].items())
        raise ModelError(
            f"no output holds one entry a sample for a batch of {step} (found: {found}); the first "
            "dimension of an output must be the batch. Use `batch: 1`, or change the model"
        )
    return joined


def collect_outputs(
    run: Run,
    source: BatchSource,
    *,
    fixed_batch: int | None = None,
    progress: Progress = silent,
    what: str = "reference",
) -> StoredOutputs:
    """Every output of `run` over `source`, for use as the `reference` of `evaluate`.

    Takes (number of samples) x (bytes of one sample's outputs) of memory: little for a
    classifier; hand `evaluate` the reference's `run` itself where outputs are large.

    Raises DataError for an empty source or outputs whose shape changes from batch to batch.
    """
    chunks: dict[str, list[Array]] = {}
    items: list[str] = []
    for batch in source:
        for name, array in run_batch(run, batch, fixed_batch=fixed_batch).items():
            chunks.setdefault(name, []).append(array)
        items.extend(batch.items)
        progress(what, len(items), source.count)
    if not items:
        raise DataError(f"{what}: the data is empty; there is nothing to evaluate")
    outputs = {}
    for name, arrays in chunks.items():
        shapes = {array.shape[1:] for array in arrays}
        if len(shapes) > 1:
            raise DataError(
                f"output {name!r} changes shape from batch to batch {sorted(shapes)[:3]}, so it "
                "cannot be kept for comparison; give every picture the same size (`resize`, `crop`)"
            )
        outputs[name] = np.concatenate(arrays)
    return StoredOutputs(outputs, tuple(items))


def evaluate(
    run: Run,
    source: BatchSource,
    *,
    metric: str | PythonMetric | None = None,
    reference: Run | StoredOutputs | None = None,
    output: str | None = None,
    fixed_batch: int | None = None,
    progress: Progress = silent,
    what: str = "evaluate",
) -> Evaluation:
    """One pass over `source`: the value of `metric`, and closeness to `reference` if there is one.

    `metric` is a name of `METRICS`, a function as `trtune.reports.metrics` describes, or None for
    closeness alone. `output` names the output with the class scores, and the only one that is
    compared with the reference; without it the first output is scored and all are compared.
    Sums are float64; memory does not depend on the number of samples.

    Raises DataError if labels are missing or not a class of the model, if the source is empty, or
    if the reference's outputs are not finite, naming the item; ModelError if the output is missing
    or is not class scores where they are needed; ValueError if `metric` is unknown, or needs a
    reference and there is none.
    """
    if isinstance(metric, str) and metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}{did_you_mean(metric, METRICS)}")
    if isinstance(metric, str) and metric in FIDELITY_METRICS and reference is None:
        raise ValueError(f"metric {metric!r} compares with a reference, and none was given")
    score, sums, samples = 0.0, Fidelity(), 0
    for batch in source:
        outputs = run_batch(run, batch, fixed_batch=fixed_batch)
        chosen = _chosen(outputs, output)
        score += _score(metric, outputs, chosen, batch)
        if reference is not None:
            expected = _expected(reference, batch, samples, fixed_batch)
            compared = [chosen] if output else list(outputs)
            sums = _compare(sums, expected, outputs, compared, chosen, batch)
        samples += len(batch)
        progress(what, samples, source.count)
    if not samples:
        raise DataError(f"{what}: the data is empty; there is nothing to evaluate")
    return _evaluation(metric, score, sums, samples, compared=reference is not None)


def _evaluation(
    metric: str | PythonMetric | None,
    score: float,
    sums: Fidelity,
    samples: int,
    *,
    compared: bool,
) -> Evaluation:
    if metric is None:
        value = None
    elif isinstance(metric, str) and metric in FIDELITY_METRICS:
        value = FIDELITY_METRICS[metric](sums)
    else:
        value = score / samples
    if sums.errors.not_finite:
        log.warning("%d elements of the outputs are NaN or Inf", sums.errors.not_finite)
    return Evaluation(
        metric=metric if isinstance(metric, str) or metric is None else metric_name(metric),
        value=value,
        samples=samples,
        sqnr_db=sqnr_db(sums) if compared else None,
        agreement=agreement(sums) if sums.compared else None,
        cosine=cosine(sums) if compared else None,
    )


def _chosen(outputs: Outputs, output: str | None) -> str:
    if output is None:
        return next(iter(outputs))
    if output not in outputs:
        raise ModelError(
            f"the model has no output {output!r}{did_you_mean(output, outputs)} "
            f"(outputs: {', '.join(map(repr, outputs))})"
        )
    return output


def _score(metric: str | PythonMetric | None, outputs: Outputs, chosen: str, batch: Batch) -> float:
    """The sum over the samples of `batch` of their scores; 0 for a metric that has none."""
    if metric is None or (isinstance(metric, str) and metric in FIDELITY_METRICS):
        return 0.0
    if isinstance(metric, str):
        scores, labels = _labelled(outputs[chosen], chosen, batch, metric)
        return float(TASK_METRICS[metric](scores, labels).sum())
    result = _call(metric, outputs, batch)
    if result.shape == (len(batch),):
        return float(result.sum())
    if result.size == 1:
        return float(result.reshape(())) * len(batch)
    raise TrtuneError(
        f"metric {metric_name(metric)} returned shape {result.shape} for {len(batch)} samples; "
        "it must return one number, or one number a sample"
    )


def _call(metric: PythonMetric, outputs: Outputs, batch: Batch) -> NDArray[np.float64]:
    try:
        return np.asarray(metric(outputs, batch), dtype=np.float64)
    except TrtuneError:
        raise
    except Exception as error:
        raise TrtuneError(
            f"metric {metric_name(metric)} failed on the batch that starts with "
            f"{batch.items[0]!r}: {type(error).__name__}: {error}"
        ) from error


def _labelled(
    array: Array, name: str, batch: Batch, metric: str
) -> tuple[Array, NDArray[np.int64]]:
    """Class scores and labels of a batch, checked against each other.

    A model that ends in ArgMax gives class indices; they become one-hot scores.
    """
    labels = labels_of(batch, metric)
    if array.size == len(batch) and array.dtype.kind in "iu" and metric == "top1":
        right = array.reshape(-1) == labels
        return np.stack([~right, right], axis=1).astype(np.float64), np.ones_like(labels)
    scores = class_scores(array, name)
    check_labels(labels, scores.shape[1], batch.items)
    return scores, labels


def _expected(
    reference: Run | StoredOutputs, batch: Batch, start: int, fixed_batch: int | None
) -> Outputs:
    if not isinstance(reference, StoredOutputs):
        return run_batch(reference, batch, fixed_batch=fixed_batch)
    stop = start + len(batch)
    if reference.items[start:stop] != batch.items:
        raise ValueError(
            f"the stored reference was collected from other data: sample {start} is "
            f"{batch.items[0]!r} here and {reference.items[start : start + 1]} there"
        )
    return {name: array[start:stop] for name, array in reference.outputs.items()}


def _compare(
    sums: Fidelity,
    expected: Outputs,
    outputs: Outputs,
    compared: list[str],
    chosen: str,
    batch: Batch,
) -> Fidelity:
    for name in compared:
        if name not in expected or expected[name].shape != outputs[name].shape:
            found = expected[name].shape if name in expected else "no such output"
            raise ValueError(
                f"output {name!r} has shape {outputs[name].shape}, the reference {found}"
            )
        try:
            sums = sums.add(expected[name], outputs[name])
        except NotFiniteError as error:
            item = batch.items[error.index * len(batch) // expected[name].size]
            raise DataError(
                f"the FP32 model's output {name!r} holds {error.value} for {item!r}; nothing can "
                "be compared with that. Check that item and the model"
            ) from error
    scores = outputs[chosen]
    if scores.ndim >= 2 and scores.shape[1] > 1 and scores.size == len(batch) * scores.shape[1]:
        shape = scores.shape[:2]
        sums = sums.add_classes(expected[chosen].reshape(shape), scores.reshape(shape))
    return sums
