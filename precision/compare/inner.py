"""Engines to look into: their inner tensors as debug tensors, or as outputs.

Debug tensors are what the runtime's fusion left whole, read from the engine as it would be used.
Where there are none, the tensors become outputs of an engine of its own, which keeps the compiler
from fusing across them and so changes the numbers a little.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from trtune.configs.errors import TrtuneError
from trtune.configs.files import hash_json
from trtune.datasets.batches import InputSpec
from trtune.precision.compare.batches import Opens
from trtune.precision.graph.file import Model, tensor_spec
from trtune.precision.graph.proto import copy_model, replace_field
from trtune.precision.runtime.api import Backend, BuildInfo, Candidate, Engine
from trtune.precision.runtime.engine_json import write_engine_json

if TYPE_CHECKING:
    from typing_extensions import Self

DEBUG_TENSORS, MARKED_OUTPUTS = "debug tensors", "marked outputs"
"""How inner tensors are read; the latter keeps the compiler from fusing."""


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
    proto = copy_model(model.proto)
    kept = [info for name, info in infos.items() if name not in specs]
    replace_field(proto.graph.value_info, kept)
    proto.graph.output.extend(infos[name] for name in specs)
    return replace(
        model,
        proto=proto,
        outputs=(*model.outputs, *specs.values()),
        sha256=hash_json([model.sha256, list(specs)]),
    )
