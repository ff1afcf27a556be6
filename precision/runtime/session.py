"""Models as onnxruntime sessions, and the engine over Polygraphy's runner."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.logger import G_LOGGER

from trtune.calibrate.sessions import ORT_ERRORS, SharedWeights, error_text, open_session
from trtune.configs.errors import DataError, ModelError, did_you_mean
from trtune.configs.system.machine import usable_cores
from trtune.datasets.batches import InputSpec
from trtune.precision.graph.file import SAVE_LIMIT, save_model
from trtune.precision.graph.proto import is_external, tensor_bytes
from trtune.precision.runtime.api import MODEL_FILE

if TYPE_CHECKING:
    from typing_extensions import Self

RUNS_AT_ONCE = 4
"""Batches, at most, that are run at once: the inner values of each are held in memory."""
ROOM_AT_ONCE = 1 << 28
"""Bytes, at most, that these may take where whole batches are run: larger ones gain nothing."""

Fed = TypeVar("Fed")
Made = TypeVar("Made")
NUMPY_NAMES = MappingProxyType({"float": "float32", "double": "float64", "string": "object"})


def make_session(
    model: onnx.ModelProto | bytes | Path,
    *,
    outputs: Sequence[str] = (),
    threads: int | None = None,
    optimize: str = "all",
    integer_kernels: bool = False,
    external_dir: Path | None = None,
    device: str = "cpu",
    weights: SharedWeights | None = None,
) -> ort.InferenceSession:
    """An onnxruntime session for `model`, which is not touched.

    `outputs` names inner tensors that the session gives after the model's own outputs, in that
    order; those that are outputs already are not added again. A marked tensor keeps
    onnxruntime from fusing across it. `threads` None leaves the number to onnxruntime. `optimize`
    is none, basic, extended or all. Without `integer_kernels`, Q/DQ pairs are computed as they are
    written, so that a pin stays a pin and the numbers are those of TensorRT's arithmetic; with it,
    onnxruntime puts integer kernels in their place. `external_dir` is where external initializers
    of a proto or of bytes lie (for a path: beside it). A proto above 2 GiB goes through a
    temporary folder. `device` is as `open_session` has it; `weights` hold the data that a proto
    was made without.

    Raises what `open_session` raises, and ValueError for an output that no node makes.
    """
    source: bytes | Path
    held: Mapping[str, ort.OrtValue] | None = None
    with ExitStack() as stack:
        if isinstance(model, onnx.ModelProto):
            outputs = _new_outputs(model, outputs)
            held = weights.read_by(model) if weights else None
            source, external_dir = _serialised(model, external_dir, stack)
        elif isinstance(model, Path) and outputs:
            source, external_dir = model.read_bytes(), model.parent
        else:
            source = model
        if outputs and not isinstance(source, Path):
            # A protobuf message behind another one is merged into it: this appends to
            # graph.output without parsing, or copying, the weights.
            extra = onnx.GraphProto(output=[onnx.ValueInfoProto(name=name) for name in outputs])
            source += onnx.ModelProto(graph=extra).SerializeToString()
        return open_session(
            source,
            device=device,
            threads=threads,
            optimize=optimize,
            integer_kernels=integer_kernels,
            external_dir=external_dir,
            weights=held,
        )


def named_values(
    session: ort.InferenceSession, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """The values of the outputs `names`, by name; none where there are no names.

    onnxruntime itself takes an empty list for "all outputs".
    """
    names = list(names)
    return dict(zip(names, session.run(names, dict(feeds)), strict=True)) if names else {}


def kept_values(
    session: ort.InferenceSession, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """`named_values` in memory of their own, to be held for long.

    An array that onnxruntime gives lies in the arena of its session, which stays as large as all
    inner tensors of the network as long as one array of it is alive.
    """
    found = named_values(session, names, feeds)
    return {n: v.copy() if isinstance(v, np.ndarray) else v for n, v in found.items()}


def runs_at_once(device: str, run_bytes: int | None) -> int:
    """How many runs of a session to make side by side, each of which takes about `run_bytes`
    (None: not known, and so one)."""
    room = 1 if run_bytes is None else ROOM_AT_ONCE // max(run_bytes, 1)
    return max(min(_at_once(device), room), 1)


def threads_each(device: str, runs: int | None = None) -> int:
    """The threads of a session of which `runs` are made at once: as many as by `ahead`, if None."""
    return max(usable_cores() // (runs or _at_once(device)), 1)


def ahead(
    run: Callable[[Fed], Made], items: Iterable[Fed], *, device: str
) -> Iterator[tuple[Fed, Made]]:
    """Each of `items` with what `run` gives for it, in order, a few being run at once on a CPU.

    Two runs of one thread take half the work of one run on two threads after the other, whose
    threads wait for each other in every node. A GPU has one run at a time.
    """
    count = _at_once(device)
    if count == 1:
        yield from ((item, run(item)) for item in items)
        return
    with ThreadPoolExecutor(count) as pool:
        begun: deque[tuple[Fed, Future[Made]]] = deque()
        for item in items:
            begun.append((item, pool.submit(run, item)))
            if len(begun) == count:
                first, found = begun.popleft()
                yield first, found.result()
        while begun:
            first, found = begun.popleft()
            yield first, found.result()


def _at_once(device: str) -> int:
    return min(usable_cores(), RUNS_AT_ONCE) if device == "cpu" else 1


def _new_outputs(model: onnx.ModelProto, outputs: Sequence[str]) -> tuple[str, ...]:
    graph = model.graph
    known = {info.name for info in graph.input} | {t.name for t in graph.initializer}
    known.update(name for node in graph.node for name in node.output)
    for name in outputs:
        if name not in known:
            raise ValueError(f"no node makes tensor {name!r}{did_you_mean(name, known)}")
    own = {info.name for info in graph.output}
    return tuple(name for name in dict.fromkeys(outputs) if name not in own)


def _serialised(
    model: onnx.ModelProto, external_dir: Path | None, stack: ExitStack
) -> tuple[bytes, Path | None]:
    """The bytes of `model`, with its weights in a temporary folder if they exceed a protobuf."""
    weights = model.graph.initializer
    if sum(map(tensor_bytes, weights)) <= SAVE_LIMIT or any(map(is_external, weights)):
        return model.SerializeToString(), external_dir
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trtune-")))
    save_model(model, folder / MODEL_FILE, save_limit=SAVE_LIMIT)
    return (folder / MODEL_FILE).read_bytes(), folder


class OrtEngine:
    """A session behind Polygraphy's `OnnxrtRunner`, to be used in `with`.

    `session` gives the session on entry, or is one. The arrays of `infer` are new for each call:
    onnxruntime copies outputs into NumPy's memory itself.
    """

    def __init__(
        self, session: ort.InferenceSession | Callable[[], ort.InferenceSession], name: str = "ort"
    ) -> None:
        self._runner = OnnxrtRunner(session, name=name)
        self._inputs: tuple[InputSpec, ...] = ()
        self._outputs: tuple[InputSpec, ...] = ()

    def __enter__(self) -> Self:
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            self._runner.activate()
        try:
            self._inputs = tuple(_spec("input", arg) for arg in self._runner.sess.get_inputs())
            self._outputs = tuple(_spec("output", arg) for arg in self._runner.sess.get_outputs())
        except ModelError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            self._runner.deactivate()

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The model's inputs; empty outside `with`."""
        return self._inputs

    @property
    def outputs(self) -> tuple[InputSpec, ...]:
        """The model's outputs, then the marked tensors; empty outside `with`."""
        return self._outputs

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output by name for one batch; entries of `feeds` that are no input are left out.

        Raises DataError if an input is missing or does not fit, or onnxruntime cannot run it;
        ValueError outside `with`.
        """
        if not self._runner.is_active:
            raise ValueError("the engine is closed; use it in a `with` block")
        wanted = {spec.name: _fitting(spec, feeds) for spec in self._inputs}
        try:
            found = dict(self._runner.infer(wanted, check_inputs=False))
        except ORT_ERRORS as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in wanted.items())
            raise DataError(
                f"onnxruntime cannot run the model on {shapes}: {error_text(error)}"
            ) from error
        # An output that is an input may be the caller's own array (before onnxruntime 1.24).
        return {
            name: array.copy()
            if name in wanted and np.may_share_memory(array, wanted[name])
            else array
            for name, array in found.items()
        }


def _spec(role: str, arg: ort.NodeArg) -> InputSpec:
    kind = arg.type
    if not kind.startswith("tensor("):
        raise ModelError(
            f"{role} {arg.name!r} is a {kind}, not a tensor; export the model without it"
        )
    element = kind[len("tensor(") : -1]
    shape = tuple(dim if isinstance(dim, (int, str)) else None for dim in arg.shape)
    return InputSpec(arg.name, shape, NUMPY_NAMES.get(element, element))


def _fitting(spec: InputSpec, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    array = feeds.get(spec.name)
    if array is None:
        raise DataError(
            f"the model's input {spec.name!r} is missing from the batch, which has "
            f"{', '.join(map(repr, feeds)) or 'nothing'}{did_you_mean(spec.name, feeds)}"
        )
    if array.dtype.name != spec.dtype and spec.dtype != "object":
        raise DataError(f"input {spec.name!r} must be {spec.dtype}; the batch has {array.dtype}")
    fits = len(array.shape) == len(spec.shape) and all(
        not isinstance(want, int) or want == got
        for want, got in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise DataError(
            f"input {spec.name!r} must have shape {list(spec.shape)}; "
            f"the batch has {list(array.shape)}"
        )
    return array


def optimized_graph(path: Path) -> onnx.ModelProto:
    """The graph that onnxruntime makes of the model at `path`, fused integer kernels included.

    Without the layout optimizations, which rename tensors and change no precision.
    Raises ModelError if onnxruntime cannot load or write it.
    """
    with tempfile.TemporaryDirectory(prefix="trtune-") as folder:
        target = Path(folder) / "optimized.onnx"
        open_session(path, optimize="extended", integer_kernels=True, write_optimized=target)
        return onnx.load(target, load_external_data=False)
