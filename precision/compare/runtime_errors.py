"""An engine against onnxruntime, cause by cause: is FP32 right, and what does the runtime add?

`engine_gate` compares the FP32 engine with the FP32 model: if these differ, nothing after it means
anything. `runtime_errors` compares a quantized engine with the same Q/DQ model in onnxruntime, so
that what quantization itself does (`compare.compare_layers`) is on both sides and drops out.

Outputs are those of the engine that is used. Inner tensors come from one that is built for looking
into: as debug tensors where the runtime shows what its fusion left whole, else as outputs, which
keeps the compiler from fusing across them and so changes the numbers a little.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import onnx
from numpy.typing import NDArray

from trtune.configs.errors import DataError, TrtuneError
from trtune.configs.files import hash_json
from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import (
    Batch,
    BatchSource,
    InputSpec,
    batch_size,
    fit_batch,
    take_rows,
)
from trtune.precision.compare.layers import MEMORY, add_batch, chunked, infer, limited
from trtune.precision.graph.file import Model, tensor_spec
from trtune.precision.runtime.api import Backend, BuildInfo, Candidate, Engine, write_engine_json
from trtune.precision.runtime.errors import ErrorSums, NotFiniteError

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger(__name__)

GATE = 1e-3
"""Mean relative error above which an FP32 engine is not FP32; float noise is about 1e-6."""
NOISE = 1e-5
"""Relative L2 error that is float noise however large the error of the tiniest elements is."""
GATE_TF32, NOISE_TF32 = 1e-1, 1e-2
"""The same two for engines that may compute in TF32, whose mantissa has 10 bits and not 23."""
DEBUG_TENSORS, MARKED_OUTPUTS = "debug tensors", "marked outputs"
"""How inner tensors are read; the latter keeps the compiler from fusing."""

Opens = Callable[[Sequence[str]], AbstractContextManager[Engine]]
"""Gives an engine whose `infer` has the tensors that are named, as far as it can show them."""


@runtime_checkable
class ShowsUnfused(Protocol):
    """A backend whose engines may be built so that they show inner tensors without marking any."""

    @property
    def shows_unfused(self) -> bool:
        """Whether the version that is installed can."""

    def build_for_comparison(self, candidate: Candidate, folder: Path) -> BuildInfo:
        """An engine with `debug_tensors` in `folder`."""


@runtime_checkable
class ShowsTensors(Protocol):
    """An engine that was built so."""

    def debug_tensors(
        self, feeds: Mapping[str, NDArray[Any]], names: Collection[str] | None
    ) -> dict[str, NDArray[Any]]:
        """Inner tensors of one batch by name."""


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


# the FP32 gate


def engine_gate(
    reference: Engine,
    engine: Engine,
    source: BatchSource,
    *,
    pictures: int,
    backend: str,
    limit: float = GATE,
    noise: float = NOISE,
) -> dict[str, ErrorSums]:
    """The errors of an FP32 engine's outputs against the FP32 model in onnxruntime.

    Both engines must be entered. An output passes if its mean relative error is at most `limit`,
    or its relative L2 error at most `noise`: elements next to zero may differ by all that they are.
    `backend` is for the message.

    Raises TrtuneError, naming the output, if one does not pass; ModelError for NaN or Inf in the
    reference or other shapes, DataError if there are no samples.
    """
    sums = {spec.name: ErrorSums() for spec in reference.outputs}
    seen = 0
    for batch in limited(source, pictures):
        sums = add_batch(sums, reference, engine, batch)
        seen += len(batch)
    if not seen:
        raise _no_samples()
    for name, total in sums.items():
        if not (total.mean_relative <= limit or total.relative_l2 <= noise):
            raise TrtuneError(
                f"the FP32 engine of {backend} is not the FP32 model: output {name!r} differs from "
                f"onnxruntime by a mean relative error of {total.mean_relative:.2g} (relative L2 "
                f"{total.relative_l2:.2g}) over {seen} pictures, at most {limit:.0e} passes and "
                "about 1e-06 is usual. Nothing quantized can be judged by it: leave `tf32` off, "
                "delete the timing cache, set a lower `optimization_level`; if it stays, another "
                f"version of {backend} may compile the model rightly"
            )
        log.info("FP32 gate of %s: %s differs by %.1e on average", backend, name,
                 total.mean_relative)  # fmt: skip
    return sums


def gate_limits(settings: Mapping[str, Any]) -> tuple[float, float]:
    """`limit` and `noise` of `engine_gate` for a backend with these settings.

    >>> gate_limits({"tf32": False})
    (0.001, 1e-05)
    """
    return (GATE_TF32, NOISE_TF32) if settings.get("tf32") else (GATE, NOISE)


# what the runtime adds


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
    chunks = chunked(tensor_bytes(reference, names, source), memory // 2) if names else []
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
            raise _no_samples()


def _no_samples() -> DataError:
    return DataError("there are no samples to compare an engine with onnxruntime on")


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


def tensor_bytes(reference: Opens, tensors: Sequence[str], source: BatchSource) -> dict[str, int]:
    """Bytes of each tensor for a batch as large as the first, measured on one sample.

    Raises DataError if there is none.
    """
    batch = next(iter(source), None)
    if batch is None:
        raise _no_samples()
    with reference(tensors) as engine:
        size = batch_size(engine.inputs, 1)
        outputs = engine.infer(fit_batch(take_rows(batch, slice(0, 1)), size).feeds)
    return {name: outputs[name].nbytes * -(-len(batch) // size) for name in tensors}


# engines to look into


def inner_kind(backend: Backend) -> str:
    """How inner tensors of this backend's engines are read: `DEBUG_TENSORS` or `MARKED_OUTPUTS`."""
    shows = isinstance(backend, ShowsUnfused) and backend.shows_unfused
    return DEBUG_TENSORS if shows else MARKED_OUTPUTS


def opens_inner(backend: Backend, candidate: Candidate, folder: Path) -> Opens:
    """What opens the engines that show inner tensors, built into `folder`.

    One engine for all, built when it is first asked for, where unfused tensors can be shown; else
    one for each chunk of tensors. The folder is the caller's to remove.
    """
    if isinstance(backend, ShowsUnfused) and backend.shows_unfused:
        return _DebugEngines(backend, candidate, folder)

    @contextmanager
    def opens(tensors: Sequence[str]) -> Iterator[Engine]:
        build_marked(backend, candidate, folder, tensors)
        with backend.load(folder) as engine:
            yield engine

    return opens


class _DebugEngines:
    """An `Opens` over one engine with debug tensors, built once."""

    def __init__(self, backend: Any, candidate: Candidate, folder: Path) -> None:
        self._backend, self._candidate, self._folder = backend, candidate, folder
        self._built: BuildInfo | None = None
        self._error: TrtuneError | None = None

    def __call__(self, tensors: Sequence[str]) -> AbstractContextManager[Engine]:
        if self._error is not None:  # it would fail again, after as long
            raise self._error
        if self._built is None:
            try:
                self._built = self._backend.build_for_comparison(self._candidate, self._folder)
            except TrtuneError as error:
                self._error = error
                raise
        return DebugView(self._backend.load(self._folder), tensors)


class DebugView:
    """An engine with debug tensors as one whose outputs are `tensors`; to be used in `with`."""

    def __init__(self, engine: Any, tensors: Sequence[str]) -> None:
        if not isinstance(engine, ShowsTensors):
            raise ValueError(f"{type(engine).__name__} has no debug tensors")
        self._engine: Any = engine
        self._tensors = frozenset(tensors)

    def __enter__(self) -> Self:
        self._engine.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._engine.__exit__(kind, error, trace)

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The engine's inputs."""
        found: tuple[InputSpec, ...] = self._engine.inputs
        return found

    @property
    def outputs(self) -> tuple[InputSpec, ...]:
        """Empty: which tensors it shows, only a run can tell."""
        return ()

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Those of the tensors that the engine shows, for one batch."""
        found: dict[str, NDArray[Any]] = self._engine.debug_tensors(feeds, self._tensors)
        return found


def build_marked(
    backend: Backend, candidate: Candidate, folder: Path, tensors: Sequence[str]
) -> BuildInfo:
    """Build `candidate` with `tensors` as outputs beside its own; engine.json says that (`marked`).

    It is an engine of another model, so it is never taken for the one that is reported. Tensors
    whose type or rank is not known are left out. Raises what the backend's `build` raises.
    """
    model = mark_outputs(candidate.model, tensors)
    marked = replace(candidate, model=model)
    info = backend.build(marked, folder)
    own = len(candidate.model.outputs)
    names = [spec.name for spec in model.outputs[own:]]
    info = replace(info, details={**info.details, "marked": names})
    write_engine_json(folder, info, marked)
    return info


def mark_outputs(model: Model, tensors: Sequence[str]) -> Model:
    """`model` with those of `tensors` as further outputs that are not yet, and are typed.

    Nodes keep their names, so that a plan for `model` fits; the hash is another.
    """
    infos = {info.name: info for info in model.proto.graph.value_info}
    own = {spec.name for spec in model.outputs}
    known = [infos[name] for name in dict.fromkeys(tensors) if name in infos and name not in own]
    specs = {info.name: spec for info in known if (spec := tensor_spec(info)) is not None}
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(info for name, info in infos.items() if name not in specs)
    proto.graph.output.extend(infos[name] for name in specs)
    return replace(
        model,
        proto=proto,
        outputs=(*model.outputs, *specs.values()),
        sha256=hash_json([model.sha256, list(specs)]),
    )
