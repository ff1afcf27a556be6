"""An onnxruntime session that hands out inner tensors at nearly no cost.

Three things make marking tensors expensive, and each is avoided here:

- *Layout.* onnxruntime computes convolutions on CPUs in a blocked layout (NCHWc). A marked tensor
  is copied back to NCHW for every batch. A histogram does not care in which order the values of
  a picture stand, so the optimized graph is taken and the blocked tensor read instead, wherever
  its channels fill whole blocks (otherwise padding would be counted).
- *Page faults.* Outputs that onnxruntime allocates are fresh memory each time. Outputs are bound
  to buffers that are used again.
- *Threads.* One batch on all cores leaves cores waiting after each layer. Each worker runs a batch
  of its own on one thread and counts it while it is in its cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from trtune.configs.errors import ModelError

LARGEST_BLOCK = 16
"""Channels in a block of the widest NCHWc layout; the narrower ones divide it."""

PROTOBUF_LIMIT = 1 << 31
ALIGNMENT = 64
NUMPY_TYPES: Mapping[str, type[Any]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
}


@dataclass(frozen=True, slots=True)
class Tapped:
    """A session, and for each tapped tensor the session output that holds its values.

    The values of a picture may stand in another order than in the model (see the module).
    """

    session: ort.InferenceSession
    outputs: Mapping[str, str]


def _options(threads: int, external_dir: Path | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Q/DQ pairs already in the model are computed as they stand.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if external_dir is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(external_dir.resolve())
        )
    return options


def _session(model: bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def session_of(model: bytes, external_dir: Path | None = None) -> ort.InferenceSession:
    """A plain session for a serialized model. Raises ModelError if onnxruntime refuses it."""
    try:
        return _session(model, _options(0, external_dir))
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise ModelError(f"onnxruntime cannot load the model for calibration: {error}") from error


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> bytes:
    """`model` serialized with `names` as further outputs; `model` is not touched.

    A protobuf message behind another one is merged into it: the weights are not copied again.
    """
    present = {output.name for output in model.graph.output}
    extra = [onnx.ValueInfoProto(name=name) for name in names if name not in present]
    addition = onnx.ModelProto(graph=onnx.GraphProto(output=extra))
    return model.SerializeToString() + addition.SerializeToString()


def tap(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    *,
    threads: int = 1,
    external_dir: Path | None = None,
) -> Tapped:
    """A session for `model` whose `tensors` can be read; `model` is not touched.

    Raises ModelError with onnxruntime's words if it cannot load the model.
    """
    marked = with_outputs(model, tensors)
    try:
        if external_dir is None and len(marked) < PROTOBUF_LIMIT:
            return _tap_optimized(marked, tensors, threads)
        return Tapped(_session(marked, _options(threads, external_dir)), {t: t for t in tensors})
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise ModelError(f"onnxruntime cannot load the model for calibration: {error}") from error


def _tap_optimized(marked: bytes, tensors: Sequence[str], threads: int) -> Tapped:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options = _options(threads, None)
        options.optimized_model_filepath = str(path)
        session = _session(marked, options)
        optimized = onnx.load(path)
    outputs = _skip_reorders(optimized, tensors)
    if all(tensor == output for tensor, output in outputs.items()):
        return Tapped(session, outputs)
    del session
    options = _options(threads, None)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return Tapped(_session(optimized.SerializeToString(), options), outputs)


def _skip_reorders(optimized: onnx.ModelProto, tensors: Sequence[str]) -> dict[str, str]:
    """Let outputs of `optimized` be the blocked tensors themselves; tensor -> output name."""
    graph = optimized.graph
    read = {name for node in graph.node for name in node.input}
    wanted = set(tensors) - read
    outputs = {tensor: tensor for tensor in tensors}
    reorders = [node for node in graph.node if node.op_type == "ReorderOutput"]
    for node in reorders:
        channels = next((a.i for a in node.attribute if a.name == "channels"), 0)
        last = next((a.i for a in node.attribute if a.name == "channels_last"), 0)
        if node.output[0] in wanted and channels and channels % LARGEST_BLOCK == 0 and not last:
            outputs[node.output[0]] = node.input[0]
            graph.node.remove(node)
    replaced = {tensor for tensor, output in outputs.items() if tensor != output}
    kept = [output for output in graph.output if output.name not in replaced]
    del graph.output[:]
    graph.output.extend(kept)
    fresh = dict.fromkeys(outputs[tensor] for tensor in tensors if tensor in replaced)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in fresh)
    return outputs


class Reader:
    """Runs a tapped session again and again into buffers of its own; one a thread."""

    def __init__(self, tapped: Tapped) -> None:
        self._tapped = tapped
        self._bound: dict[tuple[Any, ...], tuple[ort.IOBinding, dict[str, NDArray[Any]]]] = {}
        self._shapes: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}
        self._names = tuple(dict.fromkeys(tapped.outputs.values()))

    def read(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The tapped tensors for one batch. The arrays are overwritten by the next call."""
        key = tuple((name, array.shape) for name, array in feeds.items())
        values = (
            self._read_bound(key, feeds) if key in self._shapes else self._read_fresh(key, feeds)
        )
        return {tensor: values[output] for tensor, output in self._tapped.outputs.items()}

    def _read_fresh(
        self, key: tuple[Any, ...], feeds: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        arrays = self._tapped.session.run(list(self._names), dict(feeds))
        values = dict(zip(self._names, arrays, strict=True))
        self._shapes[key] = {name: array.shape for name, array in values.items()}
        return values

    def _read_bound(
        self, key: tuple[Any, ...], feeds: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        if key not in self._bound:
            self._bound = {key: self._bind(self._shapes[key])}  # one set of buffers at a time
        binding, values = self._bound[key]
        held = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        for name, array in held.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        try:
            self._tapped.session.run_with_iobinding(binding)
        except Exception:  # a shape that depends on the data: onnxruntime allocates then
            del self._bound[key]
            return self._read_fresh(key, feeds)
        return values

    def _bind(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[ort.IOBinding, dict[str, Any]]:
        binding = self._tapped.session.io_binding()
        types = {o.name: NUMPY_TYPES[o.type] for o in self._tapped.session.get_outputs()}
        values = _carve({name: (shape, np.dtype(types[name])) for name, shape in shapes.items()})
        for name, array in values.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding, values


def _carve(
    wanted: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
) -> dict[str, NDArray[Any]]:
    """Uninitialised arrays cut out of one block: NumPy asks for huge pages for a large one."""
    sizes = {
        name: int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        for name, (shape, dtype) in wanted.items()
    }
    block = np.empty(
        sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()) + ALIGNMENT, np.uint8
    )
    start = -block.ctypes.data % ALIGNMENT
    arrays = {}
    for name, (shape, dtype) in wanted.items():
        arrays[name] = block[start : start + sizes[name]].view(dtype).reshape(shape)
        start += -(-sizes[name] // ALIGNMENT) * ALIGNMENT
    return arrays
