"""Running a TensorRT or TensorRT-RTX plan: buffers, shapes, latency, layer times, inner tensors.

The module `trt` comes in as an argument: tensorrt 10 or 11, or tensorrt_rtx. Only what all of
them have is used. Where TensorRT answers False or None, the error has its last words.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trtune.configs.errors import TrtuneError
from trtune.datasets.batches import InputSpec
from trtune.precision.backends.gpu.callbacks import (
    make_allocator,
    make_listener,
    make_profiler,
    process_logger,
)
from trtune.precision.backends.gpu.driver import Stream
from trtune.precision.backends.gpu.ports import Buffers, Dims, Port, fitting, nbytes_of, numpy_type
from trtune.precision.backends.gpu.runtime import binary_size, use_device
from trtune.precision.backends.gpu.timing import GpuTiming, time_gpu

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger(__name__)


class TrtEngine:
    """A plan in a file, run on GPU `device`; to be used in `with`, which frees all it holds.

    `name` is for messages. `host_code` lets the plan bring code for the CPU, as one that is
    compatible with other versions does: for plans that were built here. `dla_core` is for one that
    was built for DLA. The arrays of `infer` are copies, the caller's to keep.
    """

    def __init__(
        self,
        trt: ModuleType,
        plan: Path,
        *,
        device: int = 0,
        name: str = "tensorrt",
        host_code: bool = False,
        dla_core: int | None = None,
    ) -> None:
        self._trt, self._plan, self._device, self._name = trt, plan, device, name
        self._host_code, self._dla_core = host_code, dla_core
        self._ports: tuple[Port, ...] = ()
        self._buffers: dict[str, Buffers] = {}
        self._shapes: dict[str, Dims] = {}
        self._stack = ExitStack()
        self._logger: Any = None
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._allocators: dict[str, Any] = {}

    def __enter__(self) -> Self:
        with use_device(self._device), ExitStack() as stack:
            self._stream = stack.enter_context(Stream())
            stack.callback(self._drop)
            self._engine = self._deserialize()
            self._context = self._new_context()
            self._ports = tuple(
                self._port(self._engine.get_tensor_name(index))
                for index in range(self._engine.num_io_tensors)
            )
            if not any(port.is_input and port.on_host for port in self._ports):
                self._prepare({port.name: port.high for port in self._ports if port.is_input})
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with use_device(self._device):
            self._stack.__exit__(kind, error, trace)

    def _drop(self) -> None:
        """Let go of everything, TensorRT's objects before the memory that they work on."""
        self._context = self._engine = self._runtime = None
        self._ports, self._shapes = (), {}
        with ExitStack() as stack:
            for held in (*self._buffers.values(), *self._allocators.values()):
                stack.callback(held.free)
            self._buffers, self._allocators = {}, {}

    def _deserialize(self) -> Any:
        trt = self._trt
        try:
            plan = self._plan.read_bytes()
        except OSError as error:
            raise TrtuneError(f"{self._plan} cannot be read ({error}); build it again") from error
        logger = self._logger = process_logger(trt)
        logger.words.clear()
        trt.init_libnvinfer_plugins(logger, "")
        try:
            self._runtime = trt.Runtime(logger)
        except (TypeError, RuntimeError) as error:
            raise self._failed(
                f"cannot start on GPU {self._device} ({error})",
                "the driver may be too old for it: `trtune doctor` says what was found",
            ) from error
        if self._host_code:
            self._runtime.engine_host_code_allowed = True
        if self._dla_core is not None:
            self._runtime.DLA_core = self._dla_core
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._failed(
                f"cannot load {self._plan} ({binary_size(len(plan))})",
                "an engine is bound to the TensorRT version and the GPU that it was built with: "
                "build it here with `trtune build CONFIG`",
            )
        return engine

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            needs = binary_size(self._engine.device_memory_size_v2)
            raise self._failed(
                f"cannot make a context for {self._plan}, which needs {needs} of GPU memory",
                "free the GPU's memory (`nvidia-smi` shows what holds it), or build for smaller "
                "shapes (`model.shapes`)",
            )
        return context

    def _failed(self, what: str, remedy: str) -> TrtuneError:
        said = "; ".join(self._logger.words) or "it does not say why"
        return TrtuneError(f"{self._name} {self._trt.__version__} {what}: {said}; {remedy}")

    def _port(self, name: str) -> Port:
        trt, engine = self._trt, self._engine
        kind = engine.get_tensor_dtype(name).name
        dtype = numpy_type(kind)
        if dtype is None:
            raise TrtuneError(
                f"{self._plan}: tensor {name!r} is {kind}, which NumPy has no type for; give the "
                "model float or integer inputs and outputs"
            )
        shape = tuple(engine.get_tensor_shape(name))
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        low = high = shape
        if is_input and -1 in shape:
            low, _, high = (tuple(s) for s in engine.get_tensor_profile_shape(name, 0))
        on_host = engine.get_tensor_location(name) == trt.TensorLocation.HOST
        return Port(name, dtype, shape, low, high, is_input, on_host)

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The engine's inputs; None for free dimensions; empty outside `with`."""
        return tuple(port.spec for port in self._ports if port.is_input)

    @property
    def outputs(self) -> tuple[InputSpec, ...]:
        """The engine's outputs; empty outside `with`."""
        return tuple(port.spec for port in self._ports if not port.is_input)

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output by name for one batch; entries of `feeds` that are no input are left out.

        Raises DataError if an input is missing, or has another dtype, or a shape outside the
        engine's profile; TrtuneError if TensorRT or CUDA cannot run it; ValueError outside `with`.
        """
        with self._staged(feeds):
            self._upload(self._stream)
            self._enqueue(self._stream)
            self._download(self._stream)
            self._stream.synchronize()
            return {port.name: self._result(port) for port in self._ports if not port.is_input}

    def latency(
        self,
        feeds: Mapping[str, NDArray[Any]],
        *,
        warmup: int = 10,
        runs: int = 50,
        graph: bool = True,
    ) -> GpuTiming:
        """Time the engine on one batch, as a CUDA graph where it can be captured.

        `compute` is the GPU's time alone, `end_to_end` the CPU's from pinned memory to pinned
        memory. Raises what `infer` raises, ValueError if `runs` is below 1.
        """
        with self._staged(feeds):
            return time_gpu(
                self._enqueue,
                stream=self._stream,
                warmup=max(warmup, 1) if graph else warmup,
                runs=runs,
                graph=graph,
                upload=self._upload,
                download=self._download,
            )

    def layer_times(
        self, feeds: Mapping[str, NDArray[Any]], *, warmup: int = 3, runs: int = 20
    ) -> dict[str, float]:
        """Median milliseconds of every layer of the engine, by its name there, in its order.

        Measuring them one by one slows the whole down: they are shares, and `latency` is the sum.
        Raises what `infer` raises, ValueError if `runs` is below 1.
        """
        if runs < 1:
            raise ValueError(f"runs is {runs}; at least one run must be measured")
        profiler = make_profiler(self._trt)
        with self._own_context(), self._staged(feeds):
            self._context.profiler = profiler
            self._upload(self._stream)
            found: list[dict[str, float]] = []
            for number in range(warmup + runs):
                self._enqueue(self._stream)
                self._stream.synchronize()
                times = profiler.taken()
                if number >= warmup:
                    found.append(times)
        names = dict.fromkeys(name for times in found for name in times)
        return {
            name: round(float(np.median([times.get(name, 0.0) for times in found])), 6)
            for name in names
        }

    def debug_tensors(
        self, feeds: Mapping[str, NDArray[Any]], names: Collection[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Inner tensors of one batch by name: all that the engine was built to show, or `names`.

        For engines of a network with `mark_unfused_tensors_as_debug_tensors` (TensorRT 10.11 and
        later) or `mark_debug`; the names are those of the engine inspector. Tensors of a type that
        NumPy lacks are left out. Empty if the engine was built without. Raises what `infer` raises.
        """
        listener = make_listener(self._trt, names, numpy_type)
        with self._own_context(), self._staged(feeds):
            # One call for what was marked tensor by tensor, one for all that fusion left whole.
            if not self._context.set_debug_listener(listener):
                raise self._failed("refuses to show inner tensors", "build with debug tensors")
            self._context.set_all_tensors_debug_state(True)
            self._context.unfused_tensors_debug_state = True
            self._upload(self._stream)
            try:
                self._enqueue(self._stream)
                self._stream.synchronize()
            finally:
                listener.reraise()
        return dict(listener.tensors)

    @contextmanager
    def _own_context(self) -> Iterator[None]:
        """A context that is thrown away, for what slows it down and cannot be undone for certain.

        One at a time, each made when it is needed: it holds the engine's whole scratch memory.
        """
        self._context = None
        try:
            yield
        finally:
            self._context = None

    def _open(self) -> None:
        """Make sure that there is a context. Raises ValueError outside `with`."""
        if self._engine is None:
            raise ValueError("the engine is closed; use it in a `with` block")
        if self._context is None:
            with use_device(self._device):
                self._context = self._new_context()

    @contextmanager
    def _staged(self, feeds: Mapping[str, NDArray[Any]]) -> Iterator[None]:
        """The inputs in pinned memory, the context's shapes and addresses set."""
        self._open()
        self._logger.words.clear()
        with use_device(self._device):
            wanted = {port.name: fitting(port, feeds) for port in self._ports if port.is_input}
            for port in self._ports:
                if port.is_input:
                    array = wanted[port.name]
                    held = self._reserve(port, array.nbytes)
                    held.host.view(array.shape, array.dtype)[...] = array
            self._prepare({name: array.shape for name, array in wanted.items()})
            yield

    def _prepare(self, shapes: Mapping[str, Dims]) -> None:
        """Give the context these input shapes, and memory for them and for what comes of them.

        An input in the CPU's memory holds its values by now: shapes are computed from them.
        """
        for port in self._ports:
            if port.is_input:
                shape = self._shapes[port.name] = shapes[port.name]
                self._bind(port, self._reserve(port, nbytes_of(shape, port.dtype)))
                if not self._context.set_input_shape(port.name, shape):
                    raise self._failed(
                        f"refuses shape {list(shape)} of input {port.name!r}",
                        f"set model.shapes.{port.name} and build again",
                    )
        undefined = self._context.infer_shapes()
        if undefined:
            raise self._failed(
                f"cannot tell shapes in {self._plan}, undefined are {', '.join(undefined)}",
                "give their inputs in model.shapes and build again",
            )
        for port in self._ports:
            if not port.is_input:
                self._prepare_output(port, tuple(self._context.get_tensor_shape(port.name)))

    def _prepare_output(self, port: Port, shape: Dims) -> None:
        self._shapes[port.name] = shape
        if -1 not in shape:
            self._bind(port, self._reserve(port, nbytes_of(shape, port.dtype)))
            return
        # Its shape depends on the data: TensorRT asks for memory once it knows.
        allocator = self._allocators.setdefault(port.name, make_allocator(self._trt))
        if not self._context.set_output_allocator(port.name, allocator):
            raise self._failed(
                f"refuses to allocate output {port.name!r}, whose shape depends on the data",
                "end the model before the node that makes it",
            )

    def _reserve(self, port: Port, nbytes: int) -> Buffers:
        held = self._buffers.get(port.name)
        if held is None or held.nbytes < nbytes:
            if held is not None:
                del self._buffers[port.name]
                held.free()
            held = self._buffers[port.name] = Buffers(nbytes, on_host=port.on_host)
        return held

    def _bind(self, port: Port, held: Buffers) -> None:
        if not self._context.set_tensor_address(port.name, held.address):
            raise self._failed(f"refuses memory for {port.name!r}", "this is a bug: report it")

    def _upload(self, stream: Stream) -> None:
        for port in self._ports:
            held = self._buffers.get(port.name)
            if port.is_input and held is not None and held.device is not None:
                view = held.host.view(self._shapes[port.name], port.dtype)
                held.device.upload(view, stream)

    def _enqueue(self, stream: Stream) -> None:
        done = self._context.execute_async_v3(stream.address)
        for allocator in self._allocators.values():
            allocator.reraise()
        if not done:
            raise self._failed(
                f"cannot run {self._plan}",
                "try a smaller batch; `nvidia-smi` shows the GPU's state",
            )

    def _download(self, stream: Stream) -> None:
        for port in self._ports:
            shape = self._shapes.get(port.name, ())
            if not port.is_input and -1 not in shape:
                held = self._buffers[port.name]
                if held.device is not None:
                    held.device.download(held.host.view(shape, port.dtype), stream)

    def _result(self, port: Port) -> NDArray[Any]:
        shape = self._shapes[port.name]
        if -1 not in shape:
            return self._buffers[port.name].host.view(shape, port.dtype).copy()
        found: NDArray[Any] = self._allocators[port.name].array(port.dtype)
        return found
