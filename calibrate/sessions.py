"""onnxruntime sessions, made here and nowhere else, on the CPU or an NVIDIA GPU.

This is the lowest place that needs one; what tells a model's outputs, checks what is fed and frees
it is `trtune.precision.runtime.session`.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from trtune.configs.errors import ConfigError, ModelError, TrtuneError
from trtune.configs.system.machine import is_installed, usable_cores

log = logging.getLogger(__name__)

OPTIMIZATION = MappingProxyType(
    {
        "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }
)

ORT_ERRORS: tuple[type[Exception], ...] = tuple(
    kind
    for kind in vars(ort_errors).values()
    if isinstance(kind, type) and issubclass(kind, Exception)
)
"""onnxruntime's own exceptions, which have no common base."""

NOT_FOR_FLOAT8 = ("ClipQuantFusion", "ClipQuantRewrite", "ReluQuantFusion", "ReluQuantRewrite")
"""onnxruntime's optimizations that fail on a model with float8 zero points. For symmetric int8
they find nothing to do, and what has integer kernels is no float8. Two versions, two names."""

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PACKAGES = ("onnxruntime", "onnxruntime-gpu")
"""Distributions that install the module onnxruntime, each over the other."""
LIBRARIES = "pip install 'onnxruntime-gpu[cuda,cudnn]' brings those that it was built for"
REINSTALL = "pip uninstall onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu alone"
OPTIMIZED_WEIGHTS = "weights.bin"
SHARED_BYTES = 1 << 12
SHARED_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8)


def open_session(
    model: bytes | Path,
    *,
    device: str = "cpu",
    stream: int | None = None,
    threads: int | None = None,
    optimize: str = "all",
    integer_kernels: bool = False,
    external_dir: Path | None = None,
    prepack: bool = True,
    write_optimized: Path | None = None,
    profile: Path | None = None,
    weights: Mapping[str, ort.OrtValue] | None = None,
) -> ort.InferenceSession:
    """An onnxruntime session for a serialized model, or the file that holds one.

    `device` is "cpu", or "cuda" or "cuda:N" for an NVIDIA GPU, where float32 stays float32 (no
    TF32); there `stream` is the handle of a CUDA stream to compute on. `threads` None leaves the
    number to onnxruntime. `optimize` is none, basic, extended or all. Without `integer_kernels`,
    Q/DQ pairs are computed as they are written; with it, onnxruntime puts integer kernels in their
    place. `external_dir` is where external initializers of bytes lie (for a path: beside it). A
    session that is never run need not `prepack` its weights. The graph that onnxruntime made of the
    model goes to `write_optimized`, with large weights beside it. `weights` takes the place of the
    external initializers of these names; sessions share them. `profile` is how the name of the
    profile begins, which the session's `end_profiling` writes.

    Raises ModelError with onnxruntime's own words if it cannot load the model, ConfigError for
    another device than those, TrtuneError for one that is not here, ValueError for an unknown
    `optimize`.
    """
    providers = providers_of(device, stream)
    options = _options(threads, optimize, integer_kernels)
    if external_dir is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(external_dir.resolve())
        )
    if weights:
        options.add_external_initializers(list(weights), list(weights.values()))
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if write_optimized is not None:
        options.optimized_model_filepath = str(write_optimized)
        # Weights beside the model, so that one above 2 GiB can be written.
        key = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(key, OPTIMIZED_WEIGHTS)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    argument = str(model) if isinstance(model, Path) else model
    try:
        session = ort.InferenceSession(
            argument,
            options,
            providers=providers,
            disabled_optimizers=[] if integer_kernels else [*NOT_FOR_FLOAT8],
        )
    except ORT_ERRORS as error:
        what = str(model) if isinstance(model, Path) else "the model"
        raise ModelError(
            f"onnxruntime {ort.__version__} cannot load {what}: {error_text(error)}; "
            "`trtune inspect MODEL` shows its operators and opset"
        ) from error
    if len(providers) > 1 and CUDA not in session.get_providers():
        raise TrtuneError(
            f"onnxruntime {ort.__version__} did not start its CUDA provider and would have run the "
            f"network on the CPU: a library of CUDA or cuDNN is missing, or too old; {LIBRARIES}"
        )
    return session


def _options(threads: int | None, optimize: str, integer_kernels: bool) -> ort.SessionOptions:
    if optimize not in OPTIMIZATION:
        raise ValueError(f"optimize is {optimize!r}; known: {', '.join(OPTIMIZATION)}")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = OPTIMIZATION[optimize]
    if threads is None and usable_cores() < (os.cpu_count() or 1):
        # Its own default is a thread for each core of the machine, pinned there.
        threads = usable_cores()
    if threads is not None:
        options.intra_op_num_threads = threads
    if not integer_kernels:
        # onnxruntime otherwise quantizes float weights and biases between a DQ and a Q itself.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Idle workers would spin on the cores that read pictures and sum errors between two runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> bytes:
    """`model` serialized with `names` as further outputs; `model` is not touched.

    A protobuf message behind another one is merged into it: the weights are not copied again.
    """
    present = {output.name for output in model.graph.output}
    extra = [onnx.ValueInfoProto(name=name) for name in names if name not in present]
    addition = onnx.ModelProto(graph=onnx.GraphProto(output=extra))
    marked: bytes = model.SerializeToString() + addition.SerializeToString()
    return marked


class SharedWeights:
    """The large constants of a graph, held once for the sessions of it and of many parts of it.

    A session is then made of a small proto: to copy 100 MB of weights into one, and back out of
    it, takes longer than what a session for a part has to do. `values` are what `open_session`
    takes as `weights`; they hold the memory that sessions made with them read.
    """

    def __init__(self, tensors: Iterable[onnx.TensorProto]) -> None:
        self.values: dict[str, ort.OrtValue] = {}
        self._stubs: dict[str, onnx.TensorProto] = {}
        self._arrays: list[NDArray[Any]] = []  # whose memory is read
        for tensor in tensors:
            if tensor.data_type in SHARED_TYPES and not _is_elsewhere(tensor):
                item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
                if math.prod(tensor.dims) * item >= SHARED_BYTES:
                    self._hold(tensor)

    def _hold(self, tensor: onnx.TensorProto) -> None:
        array = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor))
        self._arrays.append(array)
        self.values[tensor.name] = ort.OrtValue.ortvalue_from_numpy(array)
        stub = onnx.TensorProto(
            name=tensor.name,
            dims=tensor.dims,
            data_type=tensor.data_type,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        stub.external_data.add(key="location", value="shared")
        self._stubs[tensor.name] = stub

    def light(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """`tensor` as a part has it: without its data, if that is shared."""
        return self._stubs.get(tensor.name, tensor)

    def without(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """`model`, whose constants these are, without the data that is shared, for a session."""
        graph = onnx.GraphProto(name=model.graph.name)
        for part in ("node", "input", "output", "value_info", "sparse_initializer"):
            getattr(graph, part).extend(getattr(model.graph, part))
        graph.initializer.extend(map(self.light, model.graph.initializer))
        return onnx.ModelProto(
            ir_version=model.ir_version,
            opset_import=model.opset_import,
            functions=model.functions,
            graph=graph,
        )

    def read_by(self, part: onnx.ModelProto) -> dict[str, ort.OrtValue]:
        """Those of `values` that `part` has."""
        names = (tensor.name for tensor in part.graph.initializer if _is_elsewhere(tensor))
        return {name: self.values[name] for name in names if name in self.values}


def _is_elsewhere(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def cuda_number(device: str) -> int | None:
    """N of "cuda:N" (0 of "cuda"), or None for "cpu". Raises ConfigError for another word.

    >>> cuda_number("cpu"), cuda_number("cuda"), cuda_number("cuda:1")
    (None, 0, 1)
    """
    if device == "cpu":
        return None
    found = re.fullmatch(r"cuda(?::(\d+))?", device)
    if found is None:
        raise ConfigError(f"device is {device!r}: take 'cpu', 'cuda' or 'cuda:N'")
    return int(found[1] or 0)


def device_of(word: str) -> str:
    """The device that "auto", "cpu", "cuda" or "cuda:N" means here: "cpu" or "cuda:N".

    `auto` is the first GPU if onnxruntime and cuda-python can use one. Raises ConfigError for
    another word, TrtuneError for a GPU that cannot be used, with what to install.

    >>> device_of("cpu")
    'cpu'
    """
    if word == "auto":
        return "cpu" if why_no_gpu(0) else "cuda:0"
    number = cuda_number(word)
    if number is None:
        return "cpu"
    missing = why_no_gpu(number)
    if missing:
        raise TrtuneError(f"device {word!r} cannot be used: {missing}; or take 'cpu'")
    return f"cuda:{number}"


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a GPU cannot be used, and what to do about it."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.remedy})"


def gpu_obstacle(number: int) -> Obstacle | None:
    """What keeps CUDA device `number` from running networks here; None if nothing does."""
    both = tuple(name for name in PACKAGES if is_installed(name))
    if CUDA not in ort.get_available_providers():
        if len(both) > 1:
            return Obstacle(
                f"{' and '.join(both)} are both installed, and the files of the one without CUDA "
                "lie over those of the other",
                REINSTALL,
            )
        return Obstacle(
            f"onnxruntime {ort.__version__} here has no CUDA provider",
            "pip uninstall onnxruntime, then pip install 'trtune[gpu]': both packages install the "
            "same module, and pip cannot tell that one takes the place of the other",
        )
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        importlib.import_module("cuda.core")
    except ImportError as error:
        return Obstacle(f"cuda-python is not installed: {error}", "pip install 'trtune[gpu]'")
    if int(driver.cuInit(0)[0]):
        return Obstacle("NVIDIA's driver does not answer", "nvidia-smi tells more")
    status, count = driver.cuDeviceGetCount()
    if int(status) or number >= count:
        return Obstacle(f"this machine has {count} CUDA devices", "take another number")
    unloadable = _unloadable(number)
    if unloadable:
        return Obstacle(unloadable, LIBRARIES)
    if len(both) > 1:
        log.warning("%s are both installed: %s", " and ".join(both), REINSTALL)
    return None


def why_no_gpu(number: int) -> str:
    """Why CUDA device `number` cannot run networks here, and the remedy; empty if it can."""
    obstacle = gpu_obstacle(number)
    return "" if obstacle is None else str(obstacle)


@lru_cache(maxsize=4)
def _unloadable(number: int) -> str:
    """Why onnxruntime's CUDA provider does not start on a device; empty if it does."""
    identity = onnx.helper.make_node("Identity", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    graph = onnx.helper.make_graph([identity], "probe", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, ir_version=8)
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", 17))
    try:
        open_session(model.SerializeToString(), device=f"cuda:{number}")
    except TrtuneError as error:
        return str(error)
    return ""


@lru_cache(maxsize=1)
def _preload() -> None:
    """Load the libraries of NVIDIA's packages, where they are installed."""
    preload = getattr(ort, "preload_dlls", None)  # from onnxruntime 1.21 on
    if preload is not None:
        with redirect_stdout(StringIO()):
            preload()


def gpu_name(device: str) -> str:
    """The name of the GPU that `device` is, such as "NVIDIA H100 80GB HBM3"; empty for the CPU."""
    number = cuda_number(device)
    if number is None:
        return ""
    return str(importlib.import_module("cuda.core").Device(number).name)


def providers_of(device: str, stream: int | None = None) -> list[Any]:
    """onnxruntime's execution providers for `device`, in its own form.

    cuDNN's algorithms are chosen by its heuristic: its timed choice may differ from run to run, and
    the numbers with it. Raises ConfigError if that is no device, TrtuneError if onnxruntime here
    cannot use it.

    >>> providers_of("cpu")
    ['CPUExecutionProvider']
    """
    number = cuda_number(device)
    if number is None:
        return [CPU]
    if CUDA not in ort.get_available_providers():
        raise TrtuneError(
            f"onnxruntime {ort.__version__} here has no CUDA provider, so {device!r} cannot be "
            "used: pip install onnxruntime-gpu in the place of onnxruntime, or take 'cpu'"
        )
    _preload()
    ort.set_default_logger_severity(3)  # it warns for each session that a device is no plugin
    chosen = {"device_id": str(number), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    if stream is not None:
        chosen["user_compute_stream"] = str(stream)
    return [(CUDA, chosen), CPU]


def error_text(error: Exception) -> str:
    """onnxruntime's words on one line, without its own numbers."""
    text = " ".join(str(error).split())
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)[:400].rstrip(".")
