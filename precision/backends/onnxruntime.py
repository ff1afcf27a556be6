"""onnxruntime on the CPU: sessions, the engine over Polygraphy's runner, and the backend.

The default runtime: every stage works with it on any machine. Two lowerings: `emulate` keeps the
Q/DQ pairs that TensorRT would read, `deploy` writes them so that onnxruntime's own integer kernels
take their place.
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.logger import G_LOGGER

from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import DataError, ModelError, TrtuneError, did_you_mean
from trtune.datasets.batches import InputSpec
from trtune.precision.backends.base import (
    MODEL_FILE,
    BuildInfo,
    Candidate,
    Usable,
    read_engine_json,
    write_engine_json,
)
from trtune.precision.backends.readback import not_honoured, read_precisions
from trtune.precision.emulation import in_float32
from trtune.precision.graph import Model, save_model
from trtune.precision.model import SAVE_LIMIT, tensor_spec
from trtune.precision.normalise import tensor_bytes, without_weights

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger(__name__)

Lowering = Literal["emulate", "deploy"]

OPTIMIZATION = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

ORT_ERRORS: tuple[type[Exception], ...] = tuple(
    kind
    for kind in vars(ort_errors).values()
    if isinstance(kind, type) and issubclass(kind, Exception)
)
"""onnxruntime's own exceptions, which have no common base."""

NUMPY_NAMES = MappingProxyType({"float": "float32", "double": "float64", "string": "object"})


def make_session(
    model: onnx.ModelProto | bytes | Path,
    *,
    outputs: Sequence[str] = (),
    threads: int | None = None,
    optimize: str = "all",
    integer_kernels: bool = False,
    external_dir: Path | None = None,
) -> ort.InferenceSession:
    """An onnxruntime session on the CPU for `model`, which is not touched.

    `outputs` names inner tensors that the session gives after the model's own outputs, in that
    order; those that are outputs already are not added again. A marked tensor keeps
    onnxruntime from fusing across it. `threads` None leaves the number to onnxruntime. `optimize`
    is none, basic, extended or all. Without `integer_kernels`, Q/DQ pairs are computed as they are
    written, so that a pin stays a pin and the numbers are those of TensorRT's arithmetic; with it,
    onnxruntime puts integer kernels in their place. `external_dir` is where external initializers
    of a proto or of bytes lie (for a path: beside it). A proto above 2 GiB goes through a
    temporary folder.

    Raises ModelError with onnxruntime's own words if it cannot load the model, ValueError for an
    output that no node makes or an unknown `optimize`.
    """
    options = _options(threads, optimize, integer_kernels)
    source: bytes | Path
    with ExitStack() as stack:
        if isinstance(model, onnx.ModelProto):
            outputs = _new_outputs(model, outputs)
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
        if external_dir is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(external_dir.resolve())
            )
        return _load(source, options)


def _options(threads: int | None, optimize: str, integer_kernels: bool) -> ort.SessionOptions:
    if optimize not in OPTIMIZATION:
        raise ValueError(f"optimize is {optimize!r}; known: {', '.join(OPTIMIZATION)}")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = OPTIMIZATION[optimize]
    if threads is not None:
        options.intra_op_num_threads = threads
    if not integer_kernels:
        # onnxruntime otherwise quantizes float weights and biases between a DQ and a Q itself.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Idle workers would spin on the cores that read pictures and sum errors between two runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _load(source: bytes | Path, options: ort.SessionOptions) -> ort.InferenceSession:
    argument = str(source) if isinstance(source, Path) else source
    try:
        return ort.InferenceSession(argument, options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        what = str(source) if isinstance(source, Path) else "the model"
        raise ModelError(
            f"onnxruntime {ort.__version__} cannot load {what}: {_one_line(error)}; "
            "`trtune inspect MODEL` shows its operators and opset"
        ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)[:400].rstrip(".")


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
    if sum(tensor_bytes(tensor) for tensor in model.graph.initializer) <= SAVE_LIMIT or any(
        tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer
    ):
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
                f"onnxruntime cannot run the model on {shapes}: {_one_line(error)}"
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


class OnnxruntimeBackend:
    """onnxruntime with one of its two lowerings; `threads` None leaves the number to it."""

    def __init__(self, lowering: Lowering = "emulate", *, threads: int | None = None) -> None:
        self.lowering = lowering
        self.threads = threads

    @property
    def name(self) -> str:
        """ "onnxruntime/emulate" or "onnxruntime/deploy"."""
        return f"onnxruntime/{self.lowering}"

    @property
    def versions(self) -> dict[str, str]:
        """What the built model depends on."""
        return {name: version(name) for name in ("onnx", "onnxruntime", "trtune")}

    @property
    def settings(self) -> dict[str, Any]:
        """Nothing: threads change how fast a model runs, not what is written."""
        return {}

    def obstacle(self) -> str:
        """Empty: a CPU is everywhere."""
        return ""

    def build(self, candidate: Candidate, folder: Path) -> BuildInfo:
        """Lower `candidate` into `folder/model.onnx`, check it, and read back what runs in what.

        With `deploy`, `precisions` is read from the graph that onnxruntime itself runs; with
        `emulate` the Q/DQ pairs are the precision, and it is the plan's.

        Raises TrtuneError if the lowered model is invalid, has other inputs or outputs, or cannot
        be written.
        """
        from trtune.precision.lowering import LOWERINGS

        start = time.perf_counter()
        model, plan = candidate.model, candidate.plan
        table = candidate.table or CalibrationTable({})
        proto = LOWERINGS[self.lowering](model, plan, table)
        _check_lowered(model, proto, self.name)
        path = folder / MODEL_FILE
        save_model(proto, path, model.external_dir)
        planned = {name: plan.precision(name) for name in plan.compute_nodes}
        precisions = planned
        if self.lowering == "deploy":
            precisions = read_precisions(model.proto, proto, optimized_graph(path))
        info = BuildInfo(
            backend=self.name,
            path=path,
            size_bytes=sum(file.stat().st_size for file in folder.glob(f"{MODEL_FILE}*")),
            precisions=precisions,
            not_honoured=not_honoured(planned, precisions),
            seconds=time.perf_counter() - start,
            versions=self.versions,
        )
        write_engine_json(folder, info, candidate)
        return info

    def load(self, folder: Path) -> OrtEngine:
        """The engine in `folder`; its session is made on entering it.

        Raises TrtuneError if the folder holds none.
        """
        try:
            path = read_engine_json(folder).path
        except (OSError, ValueError, KeyError) as error:
            raise TrtuneError(
                f"{folder} holds no built engine ({error}); build it first"
            ) from error
        if path is None or not path.is_file():
            raise TrtuneError(f"{folder} holds no model file; build it again")
        integer = self.lowering == "deploy"
        return OrtEngine(
            lambda: make_session(
                _runnable(path),
                threads=self.threads,
                integer_kernels=integer,
                external_dir=path.parent,
            ),
            self.name,
        )

    def doctor(self) -> Usable:
        """Always usable: onnxruntime's CPU provider is part of every build of it."""
        return Usable(True, version=ort.__version__)


def _check_lowered(model: Model, proto: onnx.ModelProto, backend: str) -> None:
    try:
        onnx.checker.check_model(without_weights(proto))
    except onnx.checker.ValidationError as error:
        raise TrtuneError(
            f"the lowering for {backend} made an invalid model of {model.path}: "
            f"{' '.join(str(error).split())[:400]}"
        ) from error
    for role, before, after in (
        ("input", model.proto.graph.input, proto.graph.input),
        ("output", model.proto.graph.output, proto.graph.output),
    ):
        was, now = ([(i.name, tensor_spec(i)) for i in infos] for infos in (before, after))
        if was != now:
            raise TrtuneError(
                f"the lowering for {backend} changed the {role}s of {model.path}: {was} to {now}"
            )


def _runnable(path: Path) -> Path | onnx.ModelProto:
    """The model at `path`, with what is half in it computed as a GPU does."""
    light = onnx.load(path, load_external_data=False)
    emulated = in_float32(light)
    return path if emulated is light else emulated


def optimized_graph(path: Path) -> onnx.ModelProto:
    """The graph that onnxruntime makes of the model at `path`, fused integer kernels included.

    Without the layout optimizations, which rename tensors and change no precision.
    Raises ModelError if onnxruntime cannot load or write it.
    """
    options = _options(None, "extended", integer_kernels=True)
    with tempfile.TemporaryDirectory(prefix="trtune-") as folder:
        target = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(target)
        # Weights beside the model, so that one above 2 GiB can be written; they are not read back.
        key = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(key, "weights.bin")
        _load(path, options)
        return onnx.load(target, load_external_data=False)
