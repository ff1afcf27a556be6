"""A strict double of TensorRT 10 and 11, so that what we say to TensorRT can be tested without it.

`double(10)` and `double(11)` stand for the module. Its classes are made from the bindings' own
names, signatures and enum values (trtstrict); what they do is written here: a network from a real
ONNX file, calibration in TensorRT's order and with its way of losing exceptions, a build whose
"compiler" does what it is told, and the inspector's JSON in the form of each version. Nothing here
says what the real TensorRT makes of a model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trtnetwork import OfLayer, OfNetwork, OfParser, OfParserError, OfTensor
from trtstrict import Module, Strict, make_class, make_enum, new, snapshot

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
WORDS = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16", "int8": "Int8", "fp8": "FP8"}


@dataclass
class World:
    """What machine and compiler are like; tests change it before they build.

    Of the nodes in `swallowed` a pin has no effect, and neither has quantization.
    """

    gpu: bool = True
    fast_int8: bool = True
    dla_cores: int = 0
    build_errors: tuple[str, ...] = ()
    unsupported: frozenset[str] = frozenset()
    swallowed: frozenset[str] = frozenset()
    refuses_profiles: bool = False
    refuses_pins: bool = False
    loads: bool = True
    detail: bool = True
    broken_words: str | None = None
    logger: Any = None
    events: list[str] = field(default_factory=list)
    networks: list[Any] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)
    released: list[memoryview] = field(default_factory=list)

    def count(self, event: str) -> int:
        return self.events.count(event)


class Memory(bytes):
    """IHostMemory as a buffer, which a class in Python can only be by being bytes."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__") and name != "nbytes":
            raise AttributeError(f"'IHostMemory' object has no attribute {name!r}")
        return super().__getattribute__(name)


class OfBuilder:
    def _start(self, logger: Any) -> None:
        self._logger = self._world.logger = logger
        if not self._world.gpu:
            logger.log(self._trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def _get_platform_has_fast_int8(self) -> bool:
        return self._world.fast_int8

    def _get_num_DLA_cores(self) -> int:
        return self._world.dla_cores

    def _do_create_network(self, flags: int = 0) -> Any:
        self._world.events.append(f"create_network {flags}")
        network = new(self._trt.INetworkDefinition, layers=[], inputs=[], outputs=[], flags=flags)
        object.__setattr__(network, "_proto", None)
        object.__setattr__(network, "_complete", False)
        self._world.networks.append(network)
        return network

    def _do_create_builder_config(self) -> Any:
        trt = self._trt
        config = new(
            trt.IBuilderConfig, set={"TF32"}, profiles=[], limits={}, calibration_profile=None,
            timing_cache=None, tactics=None, builder_optimization_level=3, DLA_core=-1,
            profiling_verbosity=trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
            default_device_type=trt.DeviceType.GPU,
            hardware_compatibility_level=trt.HardwareCompatibilityLevel.NONE,
        )  # fmt: skip
        if hasattr(trt, "IInt8Calibrator"):
            object.__setattr__(config, "_int8_calibrator", None)
        self._world.configs.append(config)
        return config

    def _do_create_optimization_profile(self) -> Any:
        return new(self._trt.IOptimizationProfile, shapes={})

    def _do_build_serialized_network(self, network: Any, config: Any) -> Any:
        self._world.events.append("build")
        errors = [*self._world.build_errors, *refusals(network, config)]
        self._logger.log(self._trt.ILogger.INFO, "Global timing cache in use.")
        self._logger.log(self._trt.ILogger.VERBOSE, "Tactic: 0x0 Time: 0.01")
        scales: dict[str, float] = {}
        if not errors and getattr(config, "_int8_calibrator", None) is not None:
            scales = calibrate(self._trt, self._world, network, config)
            if not scales:
                errors.append("Calibration failure occurred with no scaling factors detected.")
        for text in errors:
            self._logger.log(self._trt.ILogger.ERROR, text)
        if errors:
            return None
        if config._timing_cache is not None:
            config._timing_cache._entries.append(f"timed {network._proto.graph.name}")
        engine = {
            "version": self._trt.__version__,
            "layers": compiled(self, network, config, scales),
        }
        dynamic = [t.name for t in network._inputs if -1 in t._shape]
        engine.update(dynamic=dynamic, io=[t.name for t in (*network._inputs, *network._outputs)])
        return memory(self._trt, json.dumps(engine).encode())


def memory(trt: Any, data: bytes) -> Any:
    return trt.IHostMemory.__new__(trt.IHostMemory, data)


def refusals(network: Any, config: Any) -> Iterator[str]:
    """What the builder refuses before it begins."""
    if (
        "OBEY_PRECISION_CONSTRAINTS" in config._set
        and "PREFER_PRECISION_CONSTRAINTS" in config._set
    ):
        yield "OBEY and PREFER are mutually exclusive"
    if any(-1 in tensor._shape for tensor in network._inputs) and not config._profiles:
        yield "Network has dynamic or shape inputs, but no optimization profile has been defined."
    for layer in network._layers:
        wanted = getattr(layer, "_precision", None)
        if wanted is None:
            continue
        name = {"HALF": "FP16", "BF16": "BF16", "INT8": "INT8"}.get(wanted.name)
        if name and name not in config._set:
            yield f"{layer.name}: precision {wanted.name} is not enabled in the builder config"
        obeyed = {"OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"} & config._set
        if not obeyed:
            yield f"{layer.name}: constrained, and the config says neither OBEY nor PREFER"


def swallow(world: World, name: str, call: Any, *args: Any) -> Any:
    """A callback as the bindings make it: an exception goes to stderr, and counts as None."""
    world.events.append(name)
    try:
        return call(*args)
    except Exception as error:
        print(f"[ERROR] Exception caught in {name}(): {error}", file=sys.stderr)
        return None


def calibrate(trt: Any, world: World, network: Any, config: Any) -> dict[str, float]:
    """Scales from the calibrator's cache, or from its data, in TensorRT's order of calls."""
    calibrator = config._int8_calibrator
    size = swallow(world, "get_batch_size", calibrator.get_batch_size)
    algorithm = swallow(world, "get_algorithm", calibrator.get_algorithm)
    first, second = (
        swallow(world, "read_calibration_cache", calibrator.read_calibration_cache) for _ in "12"
    )
    dynamic = any(-1 in tensor._shape for tensor in network._inputs)
    if dynamic and (size != 1 or config._calibration_profile is None):
        return {}
    words = {
        "ENTROPY_CALIBRATION_2": "EntropyCalibration2",
        "MINMAX_CALIBRATION": "MinMaxCalibration",
    }
    major, minor, patch = map(int, trt.__version__.split(".")[:3])
    header = f"TRT-{major * 10000 + minor * 100 + patch}-{words[algorithm.name]}"
    if first is not None and first == second and bytes(first).split(b"\n")[0] == header.encode():
        lines = bytes(first).decode().splitlines()[1:]
        return {line.rpartition(": ")[0]: 1.0 for line in lines}
    names, batches = [tensor.name for tensor in network._inputs], 0
    while True:
        pointers = swallow(world, "get_batch", calibrator.get_batch, names)
        if not isinstance(pointers, list) or not pointers:
            break
        assert len(pointers) == len(names), "the real TensorRT reads past the end"
        batches += 1
    if not batches:
        return {}
    every = ((*layer._ins, *layer._outs) for layer in network._layers)
    tensors = {t.name: 0.5 for found in every for t in found if t._kind == "FLOAT"}
    text = "\n".join([header, *(f"{name}: 3f000000" for name in tensors)]) + "\n"
    view = memoryview(bytearray(text.encode()))
    swallow(world, "write_calibration_cache", calibrator.write_calibration_cache, view)
    view.release()
    world.released.append(view)
    return tensors


def compiled(builder: Any, network: Any, config: Any, scales: dict[str, float]) -> list[Any]:
    """[nodes, precision] of each engine layer; an activation behind a weighted node is fused."""
    found: list[Any] = []
    weak = bool(network._flags == 0) and hasattr(builder._trt.BuilderFlag, "INT8")
    lacking = without_scale(builder, network, config, scales) if weak else set()
    for layer in network._layers:
        if not layer._node or layer._op in ("QuantizeLinear", "DequantizeLinear", "Constant"):
            continue
        known = {} if layer._node in lacking else scales
        runs = (
            weakly(layer, config, known, builder._world) if weak else typed(layer, builder._world)
        )
        fused = found and layer._op in ("Relu", "Clip") and found[-1][2] in WEIGHTED
        held = pinned(layer) and layer._node not in builder._world.swallowed
        if fused and (runs == found[-1][1] or not held):
            found[-1][0].append(layer._node)
            continue
        found.append([[layer._node], runs, layer._op])
    return found


FUSED_BEHIND = ("ELEMENTWISE", "ACTIVATION")


def without_scale(builder: Any, network: Any, config: Any, scales: dict[str, float]) -> set[str]:
    """Nodes left in float for want of a scale, as implicit quantization does; and its warnings.

    Every float tensor that a layer reads or writes is asked for. What a weighted layer writes may
    have the scale of what is fused behind it.
    """
    if "INT8" not in config._set or not scales:
        return set()
    constants = {t.name for layer in network._layers if layer._type.name == "CONSTANT"
                 for t in layer._outs}  # fmt: skip
    asked = dict.fromkeys(
        t.name for layer in network._layers for t in (*layer._ins, *layer._outs)
        if t._kind == "FLOAT" and t.name not in constants and not t._computes_shape
        and not t.name.startswith("(Unnamed Layer")  # between a product and its bias
    )  # fmt: skip
    for name in asked:
        if name not in scales:
            text = (
                f"Missing scale and zero-point for tensor {name}, expect fall back to non-int8 "
                "implementation for any layer consuming or producing given tensor"
            )
            builder._logger.log(builder._trt.ILogger.WARNING, text)
    found = set()
    for layer in network._layers:
        reads = [t.name for t in layer._ins if t.name in asked]
        made = [name for t in layer._outs for name in (t.name, *behind(network, t.name))]
        lost = [name for name in reads if name not in scales]
        if layer._op in WEIGHTED and (lost or not any(name in scales for name in made)):
            found.add(layer._node)
    return found


def behind(network: Any, tensor: str) -> list[str]:
    """What the activation, bias or sum that alone reads `tensor` writes, and the one behind it."""
    readers = [layer for layer in network._layers if tensor in [t.name for t in layer._ins]]
    if len(readers) != 1 or readers[0]._type.name not in FUSED_BEHIND:
        return []
    name = readers[0]._outs[0].name
    return [name, *behind(network, name)]


def pinned(layer: Any) -> bool:
    return getattr(layer, "_precision", None) is not None


def weakly(layer: Any, config: Any, scales: dict[str, float], world: World) -> str:
    swallowed = layer._node in world.swallowed
    if pinned(layer) and not swallowed:
        return {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}[str(layer._precision.name)]
    source = layer._ins[0].name if layer._ins else ""
    quantizable = "INT8" in config._set and layer._op in WEIGHTED and source in scales
    if quantizable and pinned(layer) == swallowed:
        return "int8"
    return next((flag.lower() for flag in ("FP16", "BF16") if flag in config._set), "fp32")


def typed(layer: Any, world: World) -> str:
    if layer._ins and layer._ins[0]._dequantized and layer._node not in world.swallowed:
        return str(layer._ins[0]._dequantized)
    kind = layer._ins[0]._kind if layer._ins else "FLOAT"
    return {"HALF": "fp16", "BF16": "bf16"}.get(kind, "fp32")


class OfConfig:
    def _do_set_flag(self, flag: Any) -> None:
        self._world.events.append(f"set_flag {flag.name}")
        self._set.add(flag.name)

    def _do_clear_flag(self, flag: Any) -> None:
        self._set.discard(flag.name)

    def _do_get_flag(self, flag: Any) -> bool:
        return flag.name in self._set

    def _do_set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self._limits[pool.name] = size

    def _do_get_memory_pool_limit(self, pool: Any) -> int:
        return int(self._limits.get(pool.name, 0))

    def _do_add_optimization_profile(self, profile: Any) -> int:
        if self._world.refuses_profiles:
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def _do_set_calibration_profile(self, profile: Any) -> bool:
        object.__setattr__(self, "_calibration_profile", profile)
        return True

    def _do_set_tactic_sources(self, sources: int) -> bool:
        object.__setattr__(self, "_tactics", sources)
        return True

    def _do_get_tactic_sources(self) -> int:
        return int(self._tactics)

    def _put_int8_calibrator(self, calibrator: Any) -> None:
        self._world.events.append("int8_calibrator")

    def _do_create_timing_cache(self, data: Any) -> Any:
        text = bytes(data).decode()
        if text and not text.startswith(f"{self._trt.__version__}\n"):
            return new(self._trt.ITimingCache, entries=[], fits=False)
        return new(self._trt.ITimingCache, entries=text.splitlines()[1:], fits=True)

    def _do_set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if not cache._fits and not ignore_mismatch:
            return False
        object.__setattr__(self, "_timing_cache", cache)
        return True

    def _do_get_timing_cache(self) -> Any:
        return self._timing_cache


class OfTimingCache:
    def _do_serialize(self) -> Any:
        return memory(self._trt, "\n".join([self._trt.__version__, *self._entries]).encode())

    def _do_combine(self, other: Any, ignore_mismatch: bool) -> bool:
        if not other._fits and not ignore_mismatch:
            return False
        self._entries[:] = sorted({*self._entries, *other._entries})
        return True


class OfProfile:
    def _do_set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
        self._shapes[name] = tuple(map(tuple, (low, opt, high)))


class OfRuntime:
    def _start(self, logger: Any) -> None:
        self._logger, self._engine_host_code_allowed = logger, False

    def _do_deserialize_cuda_engine(self, data: Any) -> Any:
        if not self._world.loads:
            self._logger.log(self._trt.ILogger.ERROR, "Engine deserialization failed.")
            return None
        return new(self._trt.ICudaEngine, value=json.loads(bytes(data)))


class OfEngine:
    def _do_create_engine_inspector(self) -> Any:
        return new(self._trt.EngineInspector, value=self._value, execution_context=None)

    def _do_create_execution_context(self) -> Any:
        return new(self._trt.IExecutionContext, shapes={})


class OfContext:
    def _do_set_input_shape(self, name: str, shape: Any) -> bool:
        self._shapes[name] = tuple(shape)
        return True


class OfInspector:
    def _do_get_engine_information(self, kind: Any) -> str:
        if kind.name != "JSON":
            return "one line"
        if self._world.broken_words is not None:
            return str(self._world.broken_words)
        value = self._value
        known = not value["dynamic"] or (
            self._execution_context is not None
            and set(value["dynamic"]) <= set(self._execution_context._shapes)
        )
        if not self._world.detail:
            return json.dumps({"Layers": [" + ".join(nodes) for nodes, _, _ in value["layers"]]})
        old = int(value["version"].split(".")[0]) < 11
        layers = [
            {
                "Name": " + ".join(nodes),
                "LayerType": "CaskConvolution" if op in WEIGHTED else "kgen",
                "Inputs": [described(WORDS[runs] if known else None, old)],
                "Outputs": [described("Float" if known else None, old)],
                "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes),
            }
            for nodes, runs, op in value["layers"]
        ]
        names = (
            {"Bindings": value["io"]}
            if old
            else {"I/O Tensors": [{"Name": n} for n in value["io"]]}
        )
        return json.dumps({"Layers": layers, **names})


def described(word: str | None, old: bool) -> dict[str, str]:
    """A tensor in the inspector's words: format and type together up to 10.x."""
    if old:
        text = "N/A due to dynamic shapes" if word is None else f"Row major linear {word} format"
        return {"Name": "t", "Format/Datatype": text}
    return {"Name": "t", "Format": "Row major linear", "Datatype": word or "N/A"}


class OfLogger:
    def _do_log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError("ILogger.log must be overridden")


class OfEntropy2:
    def _do_get_algorithm(self) -> Any:
        return self._trt.CalibrationAlgoType.ENTROPY_CALIBRATION_2


class OfMinMax:
    def _do_get_algorithm(self) -> Any:
        return self._trt.CalibrationAlgoType.MINMAX_CALIBRATION


MIXINS: dict[str, type] = {
    "Builder": OfBuilder,
    "IBuilderConfig": OfConfig,
    "ITimingCache": OfTimingCache,
    "IOptimizationProfile": OfProfile,
    "INetworkDefinition": OfNetwork,
    "ILayer": OfLayer,
    "ITensor": OfTensor,
    "OnnxParser": OfParser,
    "ParserError": OfParserError,
    "Runtime": OfRuntime,
    "ICudaEngine": OfEngine,
    "IExecutionContext": OfContext,
    "EngineInspector": OfInspector,
    "ILogger": OfLogger,
    "IInt8EntropyCalibrator2": OfEntropy2,
    "IInt8MinMaxCalibrator": OfMinMax,
    "IHostMemory": Memory,
}


def double(major: int, world: World | None = None) -> Any:
    """A module that stands for TensorRT `major`; `world` is its machine, also at `_world`."""
    value = snapshot(major)
    world = world or World()
    trt = Module({"__version__": value["version"], "_world": world})
    trt.init_libnvinfer_plugins = lambda logger, namespace: world.events.append("plugins")
    pending = {n: e for n, e in value["names"].items() if isinstance(e, dict)}
    for name, entry in pending.items():
        if "enum" in entry:
            setattr(trt, name, make_enum(name, entry["enum"]))
    for alias, kind in (("float32", "FLOAT"), ("float16", "HALF"), ("bfloat16", "BF16")):
        setattr(trt, alias, getattr(trt.DataType, kind))
    classes = {n: e for n, e in pending.items() if "bases" in e}
    for name in sorted(classes, key=lambda n: classes[n]["bases"] != ["pybind11_object"]):
        parent = classes[name]["bases"][0]
        base = Strict if parent == "pybind11_object" else getattr(trt, parent)
        mixin = MIXINS.get(name) or type(f"Of{name}", (), {})
        if name == "IHostMemory":
            made: Any = type(name, (Memory,), {"_trt": trt, "nbytes": property(len)})
        else:
            made = make_class(trt, name, classes[name], mixin, base)
        made._world = world
        setattr(trt, name, made)
    return trt
