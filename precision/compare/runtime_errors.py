"""What the runtime adds: a quantized engine against the same Q/DQ model in onnxruntime.

What quantization itself does (`compare_layers`) is on both sides and drops out. Outputs are those
of the engine that is used; inner tensors come from one that is built for looking into (`inner`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from trtune.configs.errors import DataError, TrtuneError
from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import Batch, BatchSource
from trtune.precision.compare.batches import (
    MEMORY,
    Opens,
    batch_bytes,
    chunked,
    infer,
    limited,
    no_samples,
)
from trtune.precision.runtime.api import Engine
from trtune.precision.runtime.errors import ErrorSums, NotFiniteError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RuntimeErrors:
    """Error of each compared tensor over `pictures` samples, outputs first.

    `missing` says for each tensor that could not be compared why. `chunks` is how many passes over
    the data the inner tensors took.
    """

    errors: Mapping[str, ErrorSums]
    missing: Mapping[str, str]
    pictures: int
    chunks: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "errors", MappingProxyType(dict(self.errors)))
        object.__setattr__(self, "missing", MappingProxyType(dict(self.missing)))


def runtime_errors(
    reference: Opens,
    engine: Engine,
    inner: Opens,
    tensors: Sequence[str],
    source: BatchSource,
    *,
    pictures: int,
    memory: int = MEMORY,
    progress: Progress = silent,
) -> RuntimeErrors:
    """The errors of an engine against `reference`, the Q/DQ model in onnxruntime.

    `engine`, not yet entered, is the one that is used, for the outputs; `inner` opens one that
    shows inner tensors. Those are `tensors`, as many at a time as keep both sides' copies of one
    batch within `memory` bytes; a single tensor above that is compared alone. Only one of the
    engines is open at a time. A tensor that an engine does not show as numbers of that kind and
    shape is missing, as is one that holds NaN or Inf in onnxruntime (quantization's doing). Where
    an engine for a chunk cannot be built, the chunk is missing.

    Raises DataError if there are no samples, TrtuneError if the engine cannot run.
    """
    with reference(()) as left:
        outputs = [spec.name for spec in left.outputs]
    names = [name for name in dict.fromkeys(tensors) if name not in outputs]
    chunks = chunked(batch_bytes(source, names, reference), memory // 2) if names else []
    errors: dict[str, ErrorSums] = {}
    missing: dict[str, str] = {}
    batches = _Passes(source, pictures, 1 + len(chunks), progress)
    with reference(()) as left, engine as right:
        _compare(left, right, outputs, batches, errors, missing)
    for chunk in chunks:
        try:
            with reference(chunk) as left, inner(chunk) as right:
                _compare(left, right, chunk, batches, errors, missing)
        except DataError:
            raise
        except TrtuneError as error:
            log.warning("%d inner tensors are not compared: %s", len(chunk), error)
            missing.update(dict.fromkeys(chunk, str(error)))
    if missing:
        log.info("%d of %d tensors cannot be compared", len(missing), len(outputs) + len(names))
    return RuntimeErrors(errors, missing, batches.pictures, len(chunks))


class _Passes:
    """The first `wanted` samples, again for each of `passes`; `pictures` is how many there are."""

    def __init__(self, source: BatchSource, wanted: int, passes: int, progress: Progress) -> None:
        self._source, self._wanted, self._progress = source, wanted, progress
        self._total = None if source.count is None else min(wanted, source.count) * passes
        self._done = self.pictures = 0

    def __iter__(self) -> Iterator[Batch]:
        self.pictures = 0
        for batch in limited(self._source, self._wanted):
            yield batch
            self.pictures += len(batch)
            self._done += len(batch)
            self._progress("comparing with onnxruntime", self._done, self._total)
        if not self.pictures:
            raise no_samples()


def _compare(
    reference: Engine,
    engine: Engine,
    names: Sequence[str],
    batches: _Passes,
    errors: dict[str, ErrorSums],
    missing: dict[str, str],
) -> None:
    """Put each of `names` into `errors` or, with the reason, into `missing`."""
    sums = dict.fromkeys(names, ErrorSums())
    for batch in batches:
        exact, tested = infer(reference, batch), infer(engine, batch)
        for name, total in list(sums.items()):
            why = _why_not(exact.get(name), tested.get(name))
            try:
                sums[name] = total if why else total.add(exact[name], tested[name])
            except NotFiniteError as error:
                why = f"it holds {error.value} in the quantized model itself"
            if why:
                missing[name] = why
                del sums[name]
    errors.update(sums)


def _why_not(exact: NDArray[Any] | None, tested: NDArray[Any] | None) -> str:
    """Why two arrays cannot be compared; empty if they can."""
    if exact is None:
        return "the quantized model does not have it"
    if tested is None:
        return "the engine does not show it: it is inside a fused layer"
    if ("float" in exact.dtype.name) != ("float" in tested.dtype.name):
        return f"it is {exact.dtype.name} in onnxruntime and {tested.dtype.name} in the engine"
    if exact.shape != tested.shape:
        return f"it is {list(exact.shape)} in onnxruntime and {list(tested.shape)} in the engine"
    return ""
