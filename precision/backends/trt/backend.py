"""TensorRT 10.x and 11.x: engine plans from a precision plan and a calibration table.

10.x is told in its own weakly typed words (flags, calibrator, constraints), or strongly typed with
Q/DQ in the graph; 11.x has only the latter. What only weak typing has is carried over there: pins
become missing Q/DQ, a calibration cache becomes Q/DQ scales. What the engine really runs in is
read from its inspector.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trtune.calibrate.calibrators import (
    Calibrator,
    DeviceFeed,
    compare_tables,
    streaming_calibrator,
    table_calibrator,
    tensorrt_cache,
    tensorrt_table,
    version_of,
)
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import TrtuneError
from trtune.configs.files import write_bytes, write_text
from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import BatchSource, batch_size
from trtune.precision.backends.gpu.callbacks import messages_to
from trtune.precision.backends.gpu.profiles import Profile, make_profiles, model_profiles
from trtune.precision.backends.trt import weak
from trtune.precision.backends.trt.build import (
    BuildLog,
    Settings,
    add_profile,
    build_failure,
    can_show_unfused,
    configure,
    create_network,
    make_builder,
    parse_model,
    show_unfused,
)
from trtune.precision.backends.trt.command import strong_options, trtexec_command, weak_options
from trtune.precision.backends.trt.engine_file import Cuda, check_plan, gpu_facts
from trtune.precision.backends.trt.inspector import (
    node_precisions,
    parse_bindings,
    parse_layers,
)
from trtune.precision.backends.trt.lints import engine_lints
from trtune.precision.backends.trt.timing_cache import save_timing_cache, use_timing_cache
from trtune.precision.backends.trt.version import (
    carried_over,
    diagnose_tensorrt,
    is_weak,
    load_tensorrt,
)
from trtune.precision.compare.inner import DEBUG_TENSORS
from trtune.precision.graph.cut import whole
from trtune.precision.graph.view import GraphView, save_model
from trtune.precision.lower.implicit import left_in_float
from trtune.precision.plan.float8 import without_float8
from trtune.precision.plan.placement import place
from trtune.precision.plan.plan import QUANTIZED, PrecisionPlan
from trtune.precision.runtime.api import (
    LOG_FILE,
    MODEL_FILE,
    PLAN_FILE,
    UNKNOWN,
    BuildInfo,
    Candidate,
    Engine,
    Usable,
)
from trtune.precision.runtime.engine_json import ENGINE_JSON, write_engine_json
from trtune.precision.runtime.not_honoured import not_honoured
from trtune.precision.runtime.whole_file import (
    WHOLE_FILE,
    WHOLE_PLAN,
    whole_inputs,
    write_whole,
)
from trtune.precision.traces.explain import explain_log

log = logging.getLogger(__name__)

LAYERS_FILE = "layers.json"
TENSORRT_CACHE = "calibration.cache"


@dataclass(slots=True)
class _Build:
    """One build on its way: what is made, and what will be told about it."""

    trt: Any
    candidate: Candidate
    folder: Path
    settings: Settings
    profiles: Mapping[str, Profile]
    messages: BuildLog = field(default_factory=BuildLog)
    logger: Any = None
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    planned: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    calibrator: Calibrator | None = None
    pinned: bool = False
    debug: bool = False
    whole: bool = False
    whole_engine: dict[str, str] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Tell the user, the engine's record and the log."""
        log.info("%s", text)
        self.notes.append(text)


class TensorRTBackend:
    """TensorRT 10.x or 11.x, whichever is installed.

    `shapes` maps a dynamic input to its min, opt and max; `batch` is the size to optimize for where
    only the batch is free. `batches` gives the calibration data, which the calibrators entropy2 and
    minmax alone need. `load_module` and `cuda` are where TensorRT and CUDA come from.
    """

    lowering = "emulate"

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        shapes: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
        batch: int = 8,
        batches: Callable[[], BatchSource] | None = None,
        progress: Progress = silent,
        load_module: Callable[[], Any] = load_tensorrt,
        cuda: Cuda | None = None,
    ) -> None:
        self._settings = settings or Settings()
        self._shapes = dict(shapes or {})
        self._batch = batch
        self._batches = batches
        self._progress = progress
        self._load_module = load_module
        self._cuda = cuda or Cuda()

    @property
    def name(self) -> str:
        """ "tensorrt", or with the typing that was asked for: "tensorrt/strong"."""
        typing = self._settings.typing
        return "tensorrt" if typing == "auto" else f"tensorrt/{typing}"

    @property
    def versions(self) -> dict[str, str]:
        """What the engine depends on beside candidate and settings, the GPU among it.

        Raises TrtuneError if TensorRT is not installed.
        """
        gpu = gpu_facts(self._cuda.find(self._settings.device))
        return {
            "tensorrt": str(self._load_module().__version__),
            **{name: version(name) for name in ("onnx", "trtune")},
            "gpu": f"{gpu['gpu']} ({gpu['compute_capability']})",
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, as JSON has it; the data too, if TensorRT calibrates on it."""
        data = None
        if self._settings.calibrator != "table" and self._batches is not None:
            data = self._batches().identity
        shapes = {n: {k: list(v) for k, v in given.items()} for n, given in self._shapes.items()}
        return {**self._settings.as_json(), "shapes": shapes, "batch": self._batch, "data": data}

    def obstacle(self) -> str:
        """Why there is no TensorRT or GPU here; it builds only where the engine also runs."""
        state = self.doctor()
        return "" if state.usable else state.reason

    def build(self, candidate: Candidate, folder: Path) -> BuildInfo:
        """Build `folder/engine.plan`, and beside it what it was made from and what was said.

        Raises TrtuneError if that is impossible: build.log then holds TensorRT's words.
        """
        return self._built(candidate, folder, debug=False)

    @property
    def shows_unfused(self) -> bool:
        """Whether `build_for_comparison` works: from TensorRT 10.11 on."""
        return can_show_unfused(self._load_module())

    def build_for_comparison(self, candidate: Candidate, folder: Path) -> BuildInfo:
        """`build`, but of an engine whose `debug_tensors` gives what fusion left whole.

        It is for looking into: accuracy and latency are those of the engine that `build` makes.
        engine.json says so (`marked`, also in the settings, so that nothing else reuses it).

        Raises what `build` raises, and TrtuneError before TensorRT 10.11.
        """
        trt = self._load_module()
        if not can_show_unfused(trt):
            raise TrtuneError(
                f"TensorRT {trt.__version__} cannot show inner tensors: that came with 10.11. "
                "Mark them as outputs instead"
            )
        return self._built(candidate, folder, debug=True)

    def _built(self, candidate: Candidate, folder: Path, *, debug: bool) -> BuildInfo:
        start = time.perf_counter()
        trt = self._load_module()
        profiles = model_profiles(candidate.model, self._shapes, batch=self._batch)
        typed_weakly = is_weak(trt, self._settings, candidate)
        work = _Build(trt, candidate, folder, self._settings, profiles, debug=debug)
        for text in carried_over(trt, self._settings, candidate, weakly=typed_weakly):
            work.note(text)
        for name in (ENGINE_JSON, PLAN_FILE, WHOLE_PLAN, TENSORRT_CACHE, LAYERS_FILE):
            (folder / name).unlink(missing_ok=True)  # of an earlier build: this one may fail
        try:
            with self._device(), ExitStack() as stack:
                work.logger = stack.enter_context(messages_to(trt, work.messages.add))
                engine = self._build(work, typed_weakly, stack)
                layers = _inspect(work, engine)
                if work.candidate.model.tail is not None and not debug:
                    self._build_whole(work, typed_weakly, stack)
        finally:
            write_text(folder / LOG_FILE, work.messages.text())
        return self._record(work, typed_weakly, layers, time.perf_counter() - start)

    def _build_whole(self, work: _Build, typed_weakly: bool, stack: ExitStack) -> None:
        """Build the same with TensorRT's plugins in their place again: the engine to deploy.

        A plugin that TensorRT does not find is told; the engine up to the cut is there without it.
        """
        work.trt.init_libnvinfer_plugins(work.logger, "")
        inputs = whole_inputs(work.candidate.model)
        profiles = make_profiles(inputs, self._shapes, batch=self._batch)
        again = _Build(
            work.trt, work.candidate, work.folder, work.settings, profiles,
            messages=work.messages, logger=work.logger, whole=True,
        )  # fmt: skip
        try:
            self._build(again, typed_weakly, stack)
        except TrtuneError as error:
            work.whole_engine["reason"] = str(error)
            work.note(f"no {WHOLE_PLAN}, the engine ends before the plugins: {error}")
        else:
            work.whole_engine["engine"] = WHOLE_PLAN
            work.note(f"{WHOLE_PLAN}: the engine with TensorRT's plugins, to deploy")

    def _device(self) -> AbstractContextManager[None]:
        """The GPU of the settings as the current one; without cuda-python that is GPU 0."""
        found = self._cuda.find(self._settings.device)
        if found is None and self._settings.device == 0:
            return nullcontext()
        return self._cuda.use(self._settings.device)

    def _build(self, work: _Build, typed_weakly: bool, stack: ExitStack) -> bytes:
        trt, settings = work.trt, work.settings
        builder = make_builder(trt, work.logger, work.messages)
        _check_int8(work, builder)
        self._check_float8(work.candidate.plan)
        network = create_network(trt, builder, strongly_typed=not typed_weakly)
        model = _lowered(work, typed_weakly)
        parse_model(trt, network, work.logger, model, work.candidate.model.opset)
        if work.debug:
            show_unfused(trt, network)
        config = builder.create_builder_config()
        for text in configure(trt, builder, config, settings):
            work.note(text)
        profile = add_profile(builder, config, work.profiles)
        if typed_weakly:
            self._weaken(work, network, config, profile, stack)
        else:
            work.options = strong_options(version_of(trt.__version__)[0])
            work.planned = _planned(work.candidate.plan)
        if settings.timing_cache is not None:
            work.note(use_timing_cache(config, settings.timing_cache))
        plan = builder.build_serialized_network(network, config)
        if work.calibrator is not None:
            work.calibrator.check()
        if plan is None:
            raise build_failure(trt, work.messages, settings, pinned=work.pinned)
        if settings.timing_cache is not None:
            save_timing_cache(config, settings.timing_cache)
        if work.calibrator is not None and not work.whole:
            _keep_cache(work, work.calibrator)
        data = bytes(plan)
        write_bytes(work.folder / (WHOLE_PLAN if work.whole else PLAN_FILE), data)
        return data

    def _check_float8(self, plan: PrecisionPlan) -> None:
        """Raise TrtuneError for FP8 on a GPU that does not multiply it."""
        if plan.fp8_nodes:
            gpu = self._cuda.find(self._settings.device)
            if gpu is not None and without_float8([gpu.compute_capability]):
                raise TrtuneError(
                    f"GPU {self._settings.device} ({gpu.name}, compute capability "
                    f"{gpu.compute_capability}) has no FP8 arithmetic: 8.9 and up do. Plan those "
                    "nodes in int8, or build on such a GPU"
                )

    def _weaken(
        self, work: _Build, network: Any, config: Any, profile: Any | None, stack: ExitStack
    ) -> None:
        """Flags, calibrator and constraints, in a network that is complete."""
        trt, plan = work.trt, work.candidate.plan
        constraints = weak.constrained_nodes(plan)
        flags = weak.set_flags(trt, config, plan, constraints=work.settings.constraints)
        if "INT8" in flags:
            with weak.deprecated_on_purpose():
                work.calibrator = stack.enter_context(self._calibrator(work))
            weak.use_calibrator(config, work.calibrator, profile)
        makers = {t: n.name for n in work.candidate.model.proto.graph.node for t in n.output if t}
        said = len(work.messages.errors)
        pins = weak.pin_layers(trt, network, constraints, makers)
        work.pinned = bool(pins.layers)
        _refused_pins(work, work.messages.errors[said:])
        if pins.without:
            work.note(f"no layer to hold to a precision for {', '.join(pins.without)}")
        work.planned = {
            **_planned(plan),
            **{n: p for n, p in constraints.items() if n in pins.layers},
        }
        by_layer = {name: constraints[n] for n, names in pins.layers.items() for name in names}
        cache = Path(TENSORRT_CACHE) if work.calibrator is not None else None
        work.options, left_out = weak_options(tuple(flags), by_layer, cache)
        work.details.update(flags=flags, constrained=by_layer)
        if left_out:
            work.details["command_leaves_out"] = list(left_out)

    def _calibrator(self, work: _Build) -> Any:
        table, kind = work.candidate.table, work.settings.calibrator
        if kind == "table":
            if table is None:
                raise ValueError("a plan with int8 needs a calibration table")
            view = GraphView.of(work.candidate.model)
            for tensor in place(view, work.candidate.plan).activations:
                table.scale(tensor)  # without one TensorRT would leave the node in float
            _tell_left(work, left_in_float(view, work.candidate.plan, table.scales))
            return table_calibrator(work.trt, tensorrt_cache(table, work.trt.__version__))
        if self._batches is None:
            raise ValueError(f"calibrator {kind!r} needs batches")
        inputs = work.candidate.model.inputs
        shapes = {spec.name: [d for d in spec.shape if isinstance(d, int)] for spec in inputs}
        shapes.update({name: list(profile.opt) for name, profile in work.profiles.items()})
        feed = DeviceFeed(self._batches(), inputs, shapes, self._cuda.allocate, self._progress)
        size = 1 if work.profiles else batch_size(inputs, 1)
        return streaming_calibrator(work.trt, kind, feed, batch_size=size)

    def _record(self, work: _Build, typed_weakly: bool, layers: str, seconds: float) -> BuildInfo:
        path = work.folder / PLAN_FILE
        found = parse_layers(layers, frozenset(work.planned))
        precisions = node_precisions(found, tuple(work.planned))
        marked = {"marked": DEBUG_TENSORS} if work.debug else {}
        lints = engine_lints(found, planned=work.planned, ends=parse_bindings(layers))
        said = explain_log(work.messages.text(), GraphView.of(work.candidate.model))
        if lints:
            work.details["lints"] = [lint.to_dict() for lint in lints]
        if said.problems:
            work.details["explained"] = [str(event) for event in said.problems]
        shell = partial(
            trtexec_command,
            engine=Path(PLAN_FILE),
            settings=self._settings,
            profiles=work.profiles,
            typing=work.options,
        )
        work.details.update(
            typing="weak" if typed_weakly else "strong",
            settings={**self.settings, **marked},
            profiles={name: profile.to_json() for name, profile in work.profiles.items()},
            command=shell(Path(MODEL_FILE)),
            **write_whole(work.candidate.model, work.folder, shell),
            notes=work.notes,
            **marked,
            **gpu_facts(self._cuda.find(self._settings.device)),
        )
        if work.whole_engine:
            work.details["whole"] |= work.whole_engine
        info = BuildInfo(
            backend=self.name,
            path=path,
            size_bytes=path.stat().st_size,
            precisions=precisions,
            not_honoured=not_honoured(work.planned, precisions, work.left),
            seconds=seconds,
            versions=self.versions,
            log="\n".join([*work.notes, work.messages.tail()]),
            details=work.details,
        )
        write_engine_json(work.folder, info, work.candidate)
        return info

    def load(self, folder: Path) -> Engine:
        """The engine in `folder`, not yet entered.

        Raises TrtuneError that says which version or GPU is needed if it cannot run here.
        """
        from trtune.precision.backends.gpu.engine import TrtEngine

        trt = self._load_module()
        gpu = self._cuda.find(self._settings.device)
        path = check_plan(folder, installed=str(trt.__version__), gpu=gpu, backend=self.name)
        settings = self._settings
        engine: Engine = TrtEngine(
            trt,
            path,
            device=settings.device,
            host_code=settings.version_compatible,
            dla_core=settings.dla_core,
        )
        return engine

    def doctor(self) -> Usable:
        """Whether TensorRT 10.x or 11.x is installed and there is a GPU for it."""
        return diagnose_tensorrt(self._load_module, self._cuda, self._settings.device)


def _planned(plan: PrecisionPlan) -> dict[str, str]:
    """What each compute node should run in, and with those that were pinned their groups."""
    found = {name: plan.precision(name) for name in plan.compute_nodes}
    for name in plan.pinned:
        if plan.precision(name) not in QUANTIZED:
            found.update({member: plan.precision(name) for member in plan.groups.get(name, ())})
    return found


def _tell_left(work: _Build, left: Mapping[str, str]) -> None:
    """Say which nodes TensorRT will leave in float, and for want of which scale."""
    for node, tensor in left.items():
        work.left[node] = (
            f"TensorRT 10 wants a scale for {tensor!r}, which the calibration table does not have"
        )
    if left:
        node, tensor = next(iter(left.items()))
        work.note(
            f"TensorRT 10 leaves {len(left)} of {len(work.candidate.plan.int8_nodes)} INT8 nodes "
            f"in float: the calibration table has no scale for a tensor of theirs, such as "
            f"{tensor!r} of {node}. Calibrate again: tables are complete by default"
        )


def _refused_pins(work: _Build, errors: Sequence[str]) -> None:
    """TensorRT logs a constraint that a layer cannot have, and goes on without it."""
    if not errors:
        return
    text = f"TensorRT refused to hold a layer to its precision: {errors[0]}"
    if work.settings.constraints == "obey":
        raise TrtuneError(f"{text}. Take that pin back, or let pins yield: `constraints: prefer`")
    work.note(text)


def _check_int8(work: _Build, builder: Any) -> None:
    """Raise TrtuneError for int8 on a GPU without INT8 arithmetic; 11.x runs on none such."""
    if "int8" not in weak.enabled_precisions(work.candidate.plan):
        return
    if hasattr(work.trt.Builder, "platform_has_fast_int8") and not weak.has_fast_int8(builder):
        raise TrtuneError(
            f"GPU {work.settings.device} has no INT8 arithmetic: set `precision.default` to fp16 "
            "or fp32, or build on a GPU of compute capability 6.1 or 7.x and later"
        )


def _lowered(work: _Build, typed_weakly: bool) -> Path:
    """Write the model that TensorRT reads: in floats, or with Q/DQ and casts."""
    from trtune.precision.lower.emulate import LOWERINGS

    model, plan = work.candidate.model, work.candidate.plan
    proto = model.proto
    if not typed_weakly:
        table = work.candidate.table or CalibrationTable({})
        proto = LOWERINGS["emulate"](model, plan, table)
    path = work.folder / (WHOLE_FILE if work.whole else MODEL_FILE)
    if work.whole and model.tail is not None:
        proto = whole(proto, model.tail)
    save_model(proto, path, model.external_dir)
    return path


def _keep_cache(work: _Build, calibrator: Calibrator) -> None:
    """Keep the calibration cache beside the engine; one of TensorRT's own is compared with ours."""
    if calibrator.cache is None:
        return
    write_bytes(work.folder / TENSORRT_CACHE, calibrator.cache)
    if work.settings.calibrator == "table" or work.candidate.table is None:
        return
    source = {"source": "tensorrt", "version": work.trt.__version__}
    theirs = tensorrt_table(calibrator.cache, source)
    rows = compare_tables(work.candidate.table, theirs)
    work.details["calibration"] = {
        "calibrator": work.settings.calibrator,
        "tensors": len(theirs.scales),
        "log2_ratios": {row.tensor: row.log2_ratio for row in rows},
    }


def _inspect(work: _Build, data: bytes) -> str:
    """The inspector's JSON, kept in layers.json; empty if the plan cannot be loaded here."""
    trt = work.trt
    runtime = trt.Runtime(work.logger)
    if work.settings.version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        work.note(f"the engine cannot be inspected here: every precision is {UNKNOWN}")
        return ""
    inspector = engine.create_engine_inspector()
    if work.profiles:  # formats of dynamic tensors are known only for given shapes
        context = engine.create_execution_context()
        for name, given in work.profiles.items():
            context.set_input_shape(name, given.opt)
        inspector.execution_context = context
    text = str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    write_text(work.folder / LAYERS_FILE, text)
    return text
