"""Every layer of a candidate against FP32, in the whole quantized network ("accumulated").

Inner tensors are marked as outputs, which keeps onnxruntime from fusing across them: these numbers
rank layers, while the accuracy of a model always comes from the unmarked one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import onnx

from trtune.calibrate.gpu.memory import device_memory
from trtune.calibrate.sessions import cuda_number
from trtune.configs.errors import TrtuneError
from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import Batch, BatchSource, InputSpec, batch_size
from trtune.precision.compare.batches import MEMORY, add_batch, batch_bytes, chunked, limited
from trtune.precision.compare.in_graph import SumsInGraph, can_merge, stays_in_graph
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.runtime.session import OrtEngine, make_session

log = logging.getLogger(__name__)

DEVICE_SHARE = 8
"""Of a GPU's memory that compared tensors may take: both models' copies, with room for kernels."""


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """Accumulated error of each compared tensor over `pictures` samples.

    `missing` are the tensors that the candidate does not have as floats (fused away, renamed or
    kept as int8 codes), or never in the shape that FP32 gives. `chunks` is how many passes over the
    data the memory limit took.
    """

    errors: Mapping[str, ErrorSums]
    missing: tuple[str, ...]
    pictures: int
    chunks: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "errors", MappingProxyType(dict(self.errors)))

    def ranked(self) -> list[tuple[str, ErrorSums]]:
        """Worst SQNR first; ties by name, so that two runs agree."""
        return sorted(self.errors.items(), key=lambda item: (item[1].sqnr_db, item[0]))


def compare_layers(
    reference: onnx.ModelProto,
    candidate: onnx.ModelProto,
    tensors: Sequence[str],
    source: BatchSource,
    *,
    pictures: int,
    memory: int = MEMORY,
    progress: Progress = silent,
    threads: int | None = None,
    integer_kernels: bool = False,
    external_dir: Path | None = None,
    device: str = "cpu",
    in_graph: bool | None = None,
) -> LayerErrors:
    """Compare `tensors`, by name, between two models on the first `pictures` samples of `source`.

    Both run batch by batch in onnxruntime with the same tensors marked, as many at a time as keep
    both models' copies of one batch within `memory` bytes; more tensors take further passes. A
    single tensor above that is compared alone. A tensor whose shape follows the data counts on the
    batches on which both models give it the same shape. The last batch is cut to `pictures`.
    `integer_kernels` is for candidates lowered for deployment (see `make_session`). `external_dir`
    is where external weights of both models are, `device` where both run. With `in_graph` (by
    default on a GPU) the sums are taken by the runtime itself, see `SumsInGraph`.

    Raises ValueError for a tensor that `reference` does not have, DataError if there are no
    samples or they do not fit, ModelError (naming picture and tensor) for NaN or Inf in the
    reference.
    """
    names = list(dict.fromkeys(tensors))
    exact = _Marked(reference, threads, False, external_dir, device)
    tested = _Marked(candidate, threads, integer_kernels, external_dir, device)
    made = tested.tensors
    present = [name for name in names if name in made]
    if not present:
        return LayerErrors({}, tuple(names), 0, 0)
    merging = stays_in_graph(device, in_graph)
    merging = merging and not integer_kernels and can_merge(reference, candidate)
    room = _device_room(device, memory) if merging else memory
    chunks = chunked(batch_bytes(source, present, exact.engine), room // 2)
    total = None if source.count is None else min(pictures, source.count) * len(chunks)
    errors: dict[str, ErrorSums] = {}
    done = 0
    progress("comparing layers", 0, total)
    for chunk in chunks:
        with exact.engine(chunk) as left, tested.engine(chunk) as right:
            sums = dict.fromkeys(_comparable(chunk, left.outputs, right.outputs), ErrorSums())
            inside = exact.sums_with(tested, left, right, list(sums)) if merging else None
            for batch in limited(source, pictures):
                own = inside.of(batch.feeds) if inside is not None and _whole(left, batch) else None
                if own is None:
                    sums = add_batch(sums, left, right, batch, alike=False)
                else:
                    sums = {name: total.merge(own[name]) for name, total in sums.items()}
                done += len(batch)
                progress("comparing layers", done, total)
        errors.update((name, total) for name, total in sums.items() if total.count)
    missing = tuple(name for name in names if name not in errors)
    if missing:
        log.info("%d of %d tensors are not in the candidate", len(missing), len(names))
    ordered = {name: errors[name] for name in names if name in errors}
    return LayerErrors(ordered, missing, done // len(chunks), len(chunks))


@dataclass(frozen=True, slots=True)
class _Marked:
    """A model whose inner tensors can be marked."""

    proto: onnx.ModelProto
    threads: int | None
    integer_kernels: bool
    external_dir: Path | None
    device: str

    @property
    def tensors(self) -> frozenset[str]:
        """Everything that can be marked and depends on data."""
        made = {name for node in self.proto.graph.node for name in node.output}
        return frozenset(made.union(info.name for info in self.proto.graph.input))

    def engine(self, tensors: Sequence[str]) -> OrtEngine:
        return OrtEngine(
            lambda: make_session(
                self.proto,
                outputs=tensors,
                threads=self.threads,
                integer_kernels=self.integer_kernels,
                external_dir=self.external_dir,
                device=self.device,
            )
        )

    def sums_with(
        self, other: _Marked, left: OrtEngine, right: OrtEngine, tensors: Sequence[str]
    ) -> SumsInGraph | None:
        """The sums of `tensors` in this model and the `other`; None unless all are float32."""
        for engine in (left, right):
            kinds = {spec.name: spec.dtype for spec in engine.outputs}
            if any(kinds[name] != "float32" for name in tensors):
                return None
        try:
            return SumsInGraph(
                self.proto,
                other.proto,
                tensors,
                external_dir=self.external_dir,
                device=self.device,
                threads=self.threads,
            )
        except TrtuneError as error:  # each loads alone, so both are compared one by one
            log.info("layers are compared on the host: %s", error)
            return None


def _whole(engine: OrtEngine, batch: Batch) -> bool:
    """Whether `batch` is run as it is, without padding."""
    return batch_size(engine.inputs, len(batch), batch.axes) == len(batch)


def _device_room(device: str, memory: int) -> int:
    """Bytes for compared tensors: an eighth of the GPU's, or `memory` on the CPU."""
    number = cuda_number(device)
    return memory if number is None else max(memory, device_memory(number) // DEVICE_SHARE)


def _comparable(
    names: Iterable[str], exact: Iterable[InputSpec], tested: Iterable[InputSpec]
) -> list[str]:
    """Those of `names` that hold the same kind of number in both models."""
    kinds = [{spec.name: _is_float(spec.dtype) for spec in specs} for specs in (exact, tested)]
    return [name for name in names if kinds[0][name] == kinds[1][name]]


def _is_float(dtype: str) -> bool:
    return "float" in dtype
