"""A strict double of the part of TensorRT that runs an engine, for machines without one.

Names, writable properties, numbers of arguments and enum values are those of the real bindings, as
`trtapi` has them; another one raises. It works on the memory of a `CudaDouble`, in TensorRT's
order: an engine reads the addresses that it was given, in the stream that it is called with. An
exception in a callback is swallowed, as TensorRT does. What its engine computes is `2 x + 1`, or
the positive elements of it where `Plan.ragged` is set (an output whose shape depends on the data).
With `Plan.copies` it is a copy from GPU memory to GPU memory, queued in the stream: that runs on a
real GPU too.
"""

from __future__ import annotations

import ctypes
import inspect
import json
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from cudadouble import Status
from numpy.typing import NDArray

SNAPSHOTS = Path(__file__).parent / "trtapi"
MAGIC = b"ptrt"
LAYERS = {"conv + relu": 0.25, "head": 0.5}


@dataclass(frozen=True)
class Plan:
    """What an engine of the double is: one input `x`, one output `y`, and how it misbehaves."""

    shape: tuple[int, ...] = (-1, 4)
    low: tuple[int, ...] = (1, 4)
    high: tuple[int, ...] = (8, 4)
    dtype: str = "FLOAT"
    on_host: bool = False
    ragged: bool = False
    copies: bool = False
    capturable: bool = True
    debug: tuple[str, ...] = ("inner",)
    debug_type: str = "FLOAT"
    memory: int = 4096
    broken: str = ""

    def write(self, path: Path) -> Path:
        """The plan as a file."""
        path.write_bytes(MAGIC + json.dumps(asdict(self)).encode())
        return path


def capsule(address: int) -> Any:
    """A `void*` as pybind11 hands it over."""
    make = ctypes.pythonapi.PyCapsule_New
    make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    make.restype = ctypes.py_object
    return make(address, None, None)


def at(address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """The array at an address."""
    size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
    memory = (ctypes.c_ubyte * size).from_address(address)
    return np.ndarray(shape, dtype, buffer=memoryview(memory).cast("B"))


class Base:
    """What a pybind11 class that Python derives from does: it must be initialised."""

    def __init__(self) -> None:
        self.initialised = True


def ready(value: Any, kind: type) -> Any:
    """`value` as an argument of type `kind`, as pybind11 checks it."""
    if not isinstance(value, kind) or not getattr(value, "initialised", False):
        raise TypeError(f"incompatible function arguments: {value!r} for {kind.__name__}")
    return value


class Bound:
    """An object of the bindings: only names of the snapshot, only writable ones set."""

    api: dict[str, Any]

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            known = self.api.get(name)
            if not isinstance(known, dict) or known["set"] is None:
                raise AttributeError(f"{type(self).__name__} has no property {name!r} to set")
        object.__setattr__(self, name, value)


def bind(cls: type[Bound], members: dict[str, Any]) -> type[Any]:
    """`cls` with the snapshot of its namesake; what the real one lacks is an error here."""
    for name, value in vars(cls).items():
        if name.startswith("_") or name == "api":
            continue
        known = members[name]
        if isinstance(known, list):
            count = len(inspect.signature(value).parameters)
            takes = [sig.partition("(")[2].rpartition(") ->")[0].split(", ") for sig in known]
            assert any(len([p for p in t if " = " not in p]) <= count <= len(t) for t in takes), (
                f"{cls.__name__}.{name} takes {count}, the real one {known}"
            )
    return type(cls.__name__, (cls,), {"api": members})


class EngineDouble(ModuleType):
    """The module `tensorrt` of one version, "10" or "11", over the memory of `cuda`.

    `cuda` is a `CudaDouble`, or the real `cuda.bindings.runtime` for plans that copy.
    """

    def __init__(self, version: str, cuda: Any) -> None:
        super().__init__("tensorrt")
        snapshot = json.loads((SNAPSHOTS / f"trt-{version}.json").read_text("utf-8"))
        names = snapshot["names"]
        self.__version__ = snapshot["version"]
        self._cuda, self._names = cuda, names
        for name in ("DataType", "TensorIOMode", "TensorLocation"):
            setattr(self, name, IntEnum(name, names[name]["enum"]))
        severity = IntEnum("Severity", names["ILogger"]["nested"]["Severity"]["enum"])
        self.ILogger = type("ILogger", (Base,), {"Severity": severity})
        for name in ("IProfiler", "IDebugListener", "IOutputAllocator"):
            setattr(self, name, type(name, (Base,), {}))
        classes = {"Runtime": _Runtime, "ICudaEngine": _Engine, "IExecutionContext": _Context}
        for name, cls in classes.items():
            setattr(self, name, bind(cls, names[name]["members"]))
        self._contexts, self._starts = 0, True

    def init_libnvinfer_plugins(self, logger: Any, namespace: str) -> bool:
        ready(logger, self.ILogger)
        return True


class _Runtime(Bound):
    def __init__(self, logger: Any) -> None:
        self._trt = _module_of(logger)
        self._logger = ready(logger, self._trt.ILogger)
        if not self._trt._starts:
            self._say("CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def _say(self, text: str) -> None:
        self._logger.log(self._trt.ILogger.Severity.ERROR, text)

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        if not serialized_engine.startswith(MAGIC):
            self._say("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization "
                      "assertion stdVersionRead == kSERIALIZATION_VERSION failed.)")  # fmt: skip
            return None
        value = json.loads(serialized_engine[len(MAGIC) :])
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return self._trt.ICudaEngine(self, Plan(**fields))


def _module_of(logger: Any) -> EngineDouble:
    for cls in type(logger).__mro__:
        if cls.__name__ == "Logger":
            found: EngineDouble = inspect.getclosurevars(cls.__init__).nonlocals["trt"]
            return found
    raise TypeError("not a logger")


class _Engine(Bound):
    num_io_tensors = 2

    def __init__(self, runtime: Any, plan: Plan) -> None:
        self._runtime, self._plan, self._trt = runtime, plan, runtime._trt

    @property
    def device_memory_size_v2(self) -> int:
        return self._plan.memory

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y")[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._trt.TensorIOMode
        return {"x": modes.INPUT, "y": modes.OUTPUT}[name]

    def get_tensor_dtype(self, name: str) -> Any:
        return self._trt.DataType[self._plan.dtype]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        ragged = name == "y" and self._plan.ragged
        return (-1,) if ragged else self._plan.shape

    def get_tensor_location(self, name: str) -> Any:
        host = self._plan.on_host and name == "x"
        return self._trt.TensorLocation.HOST if host else self._trt.TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert (name, profile_index) == ("x", 0)
        return [self._plan.low, self._plan.low, self._plan.high]

    def create_execution_context(self) -> Any:
        if self._plan.broken == "context" or self._trt._contexts:
            self._runtime._say("Requested amount of GPU memory could not be allocated.")
            return None
        return self._trt.IExecutionContext(self)


class _Context(Bound):
    def __init__(self, engine: Any) -> None:
        self._engine, self._plan, self._trt = engine, engine._plan, engine._trt
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] | None = None
        self._allocator: Any = None
        self._listener: Any = None
        self._profiler: Any = None
        self._all = self._unfused = False
        self._trt._contexts += 1

    def __del__(self) -> None:
        self._trt._contexts -= 1

    @property
    def profiler(self) -> Any:
        return self._profiler

    @profiler.setter
    def profiler(self, value: Any) -> None:
        self._profiler = ready(value, self._trt.IProfiler)

    @property
    def unfused_tensors_debug_state(self) -> bool:
        return self._unfused

    @unfused_tensors_debug_state.setter
    def unfused_tensors_debug_state(self, value: bool) -> None:
        self._unfused = value

    def set_all_tensors_debug_state(self, flag: bool) -> bool:
        self._all = flag
        return True

    def set_debug_listener(self, listener: Any) -> bool:
        self._listener = ready(listener, self._trt.IDebugListener)
        return self._plan.broken != "listener"

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        self._allocator = ready(output_allocator, self._trt.IOutputAllocator)
        return self._plan.broken != "allocator"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "x"
        assert isinstance(shape, tuple)
        limits = zip(self._plan.low, shape, self._plan.high, strict=True)
        if self._plan.broken == "shape" or not all(a <= b <= c for a, b, c in limits):
            self._engine._runtime._say("setInputShape: Error Code 3: API Usage Error")
            return False
        self._shape = shape
        return True

    def infer_shapes(self) -> list[str]:
        assert not self._plan.on_host or "x" in self._addresses, "values of a shape input first"
        return ["y"] if self._plan.broken == "shapes" or self._shape is None else []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self._shape is not None
        return (-1,) if name == "y" and self._plan.ragged else self._shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return memory > 0 and self._plan.broken != "address"

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda, plan = self._trt._cuda, self._plan
        assert isinstance(stream_handle, int)
        if plan.copies:
            return self._copy(stream_handle)
        state = cuda._find("stream", stream_handle)
        capturing = state.captured is not None
        if plan.broken == "run" or (capturing and not plan.capturable):
            self._engine._runtime._say("enqueueV3: Error Code 1: Cuda Runtime (operation not "
                                       "permitted when stream is capturing)")  # fmt: skip
            return False
        if not plan.ragged:
            return bool(cuda.work(stream_handle, self._compute, 2.0) == Status.cudaSuccess)
        self._compute()
        return self._allocator.error is None and self._after(stream_handle)

    def _copy(self, stream: int) -> bool:
        cuda, plan = self._trt._cuda, self._plan
        assert self._shape is not None
        nbytes = int(np.prod(self._shape)) * _numpy(plan.dtype).itemsize
        source = self._addresses["x"]
        target = self._addresses.get("y", 0)
        if plan.ragged:
            target = self._allocator.reallocate_output_async("y", 0, nbytes, 256, stream)
            self._allocator.notify_shape("y", (int(np.prod(self._shape)),))
        kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        (status,) = cuda.cudaMemcpyAsync(target, source, nbytes, kind, stream)
        if self._listener is not None and self._all and self._unfused:
            where, dtype = self._trt.TensorLocation.DEVICE, self._trt.DataType[plan.dtype]
            self._listener.process_debug_tensor(target, where, dtype, self._shape, "copy", stream)
        return int(status) == 0

    def _compute(self) -> None:
        plan, dtype = self._plan, _numpy(self._plan.dtype)
        assert self._shape is not None
        nbytes = int(np.prod(self._shape)) * dtype.itemsize
        assert plan.on_host or self._trt._cuda._on_gpu(self._addresses["x"], nbytes)
        found = (at(self._addresses["x"], self._shape, dtype) * 2 + 1).astype(dtype)
        if plan.ragged:
            found = found[found > 0]
            allocate = self._allocator.reallocate_output_async
            address = allocate("y", 0, max(found.nbytes, 1), 256, 0)
            if not address:
                return
            self._allocator.notify_shape("y", found.shape)
        else:
            assert self._trt._cuda._on_gpu(self._addresses["y"], nbytes)
            address = self._addresses["y"]
            self._after(0)
        at(address, found.shape, dtype)[...] = found

    def _after(self, stream: int) -> bool:
        if self._profiler is not None:
            for layer, milliseconds in LAYERS.items():
                self._profiler.report_layer_time(layer, milliseconds)
            self._profiler.report_layer_time("head", 0.5)
        if self._listener is not None and self._all and self._unfused:
            return all([self._show(name) for name in self._plan.debug])
        return True

    def _show(self, name: str) -> bool:
        cuda, trt = self._trt._cuda, self._trt
        host = name == "on host"
        values = np.arange(6, dtype=_numpy(self._plan.debug_type)).reshape(2, 3)
        _, memory = (cuda.cudaHostAlloc(24, 0)) if host else cuda.cudaMalloc(24)
        at(memory, (2, 3), values.dtype)[...] = values
        _, stream = cuda.cudaStreamCreateWithFlags(1)
        location = trt.TensorLocation.HOST if host else trt.TensorLocation.DEVICE
        kind = trt.DataType[self._plan.debug_type]
        shown = self._listener.process_debug_tensor(
            capsule(memory), location, kind, (2, 3), name, stream
        )
        cuda.cudaStreamDestroy(stream)
        (cuda.cudaFreeHost if host else cuda.cudaFree)(memory)
        return bool(shown)


def _numpy(kind: str) -> np.dtype[Any]:
    names = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "FP4": "uint8"}
    return np.dtype(names[kind])
