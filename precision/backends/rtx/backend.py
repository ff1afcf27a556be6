"""TensorRT-RTX: real engines from explicit Q/DQ, also on a machine without a GPU.

Each build is a process of its own. What every node got is read from the compiler's own log, and
what is not as planned is said; where the compiler has no INT8 for a node, or loses it in an
optimization of its own, the build is repeated with what helps.
"""

from __future__ import annotations

import importlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import onnx

from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import ConfigError, TrtuneError, did_you_mean
from trtune.configs.files import atomic_path
from trtune.configs.values import BUILD_SECONDS
from trtune.precision.backends.gpu.profiles import Profile, find_gpu, make_profiles, model_profiles
from trtune.precision.backends.rtx.child import Request
from trtune.precision.backends.rtx.elementwise import read_as_codes
from trtune.precision.backends.rtx.log import Account, accounts, complaints, read_kernels
from trtune.precision.backends.rtx.process import BuildError, build_in_child, why_not_loaded
from trtune.precision.backends.rtx.repair import (
    insert_guards,
    refused_nodes,
    torn_apart,
    unquantized,
    without_float_only,
)
from trtune.precision.backends.rtx.support import (
    COMPUTE_CAPABILITIES,
    DISTRIBUTION,
    NAME,
    REMEDY,
    WITHOUT_INT8,
    build_command,
    cuda_version,
    rtx_version,
    unsupported,
    why_not,
)
from trtune.precision.graph.file import Model
from trtune.precision.graph.proto import default_opset
from trtune.precision.graph.view import save_model
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.float8 import without_float8
from trtune.precision.plan.plan import ELEMENTWISE_OPS, SHAPE, PrecisionPlan
from trtune.precision.runtime.api import (
    LOG_FILE,
    MODEL_FILE,
    PLAN_FILE,
    BuildInfo,
    Candidate,
    Usable,
)
from trtune.precision.runtime.engine_json import ENGINE_JSON, read_engine_json, write_engine_json
from trtune.precision.runtime.whole_file import (
    WHOLE_FILE,
    WHOLE_PLAN,
    whole_inputs,
    write_whole,
)

if TYPE_CHECKING:
    from trtune.precision.runtime.api import Engine

log = logging.getLogger(__name__)

MOST_BUILDS = 8
LOG_MARKS = ("[I]", "[W]", "[E]")


@dataclass(frozen=True, slots=True)
class _Built:
    """A finished build: where its files are, what was planned for it, and what came out."""

    folder: Path
    plan: PrecisionPlan
    guards: tuple[str, ...]
    accounts: Mapping[str, Account]
    readable: bool

    @property
    def precisions(self) -> dict[str, str]:
        """What each node came out in."""
        return {node: account.precision for node, account in self.accounts.items()}


class RtxBackend:
    """TensorRT-RTX for some GPUs, named by compute capability; none named: the one in this machine.

    `workspace` is scratch memory in bytes, `optimization_level` 0 to 5; None leaves them to the
    compiler. `shapes` maps a dynamic input to its min, opt and max shape; one whose batch alone
    is free may be left out (`batch` is then its opt). `timeout` is in seconds, for one build.
    Without `tf32`, what is planned in fp32 is computed in fp32 and not in its 19-bit form.

    Raises ConfigError for a compute capability that TensorRT-RTX does not know.
    """

    lowering = "emulate"

    def __init__(
        self,
        *,
        compute_capabilities: Sequence[str] = (),
        workspace: int | None = None,
        optimization_level: int | None = None,
        shapes: Mapping[str, Mapping[str, Sequence[int]]] = MappingProxyType({}),
        batch: int = 8,
        timeout: float = BUILD_SECONDS,
        tf32: bool = False,
    ) -> None:
        for found in compute_capabilities:
            if found not in COMPUTE_CAPABILITIES:
                raise ConfigError(
                    f"backends: {NAME}: compute_capabilities: {unsupported(found)}"
                    f"{did_you_mean(found, COMPUTE_CAPABILITIES)}"
                )
        self.compute_capabilities = tuple(dict.fromkeys(compute_capabilities))
        self.workspace = workspace
        self.optimization_level = optimization_level
        self.shapes = shapes
        self.batch = batch
        self.timeout = timeout
        self.tf32 = tf32

    @property
    def name(self) -> str:
        """ "tensorrt_rtx"."""
        return NAME

    @property
    def versions(self) -> dict[str, str]:
        """What the built engine depends on; "" for TensorRT-RTX where it is not installed."""
        return {
            "onnx": version("onnx"),
            NAME: rtx_version() or "",
            "trtune": version("trtune"),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What a build is asked for, as it stands in `details` of what it gave."""
        return {
            "compute_capabilities": list(self.targets()),
            "workspace": self.workspace,
            "optimization_level": self.optimization_level,
            "shapes": {
                name: {word: list(shape[word]) for word in ("min", "opt", "max")}
                for name, shape in self.shapes.items()
            },
            "batch": self.batch,
            "tf32": self.tf32,
        }

    def targets(self) -> tuple[str, ...]:
        """The compute capabilities to build for: those named, else that of the GPU here.

        Raises ConfigError if none is named and there is no GPU, or one that is not supported.
        """
        if self.compute_capabilities:
            return self.compute_capabilities
        gpu = find_gpu()
        say = (
            "name what to build for, as in backends: "
            '[{name: tensorrt_rtx, compute_capabilities: ["8.9"]}]'
        )
        if gpu is None:
            raise ConfigError(f"backends: {NAME}: no NVIDIA GPU was found here; {say}")
        if gpu.compute_capability not in COMPUTE_CAPABILITIES:
            what = unsupported(gpu.compute_capability)
            raise ConfigError(f"backends: {NAME}: {what}, and that is {gpu}; {say}")
        return (gpu.compute_capability,)

    def obstacle(self) -> str:
        """Why engines cannot run on this machine; empty if they can."""
        return why_not(find_gpu(), self.targets())

    def build(self, candidate: Candidate, folder: Path) -> BuildInfo:
        """Lower and build `candidate`: engine.plan, model.onnx (what was built), build.log.

        Raises ConfigError for settings that cannot work, ModelError for an operator that cannot be
        parsed, TrtuneError for what else goes wrong, with the compiler's own words.
        """
        start = time.perf_counter()
        if rtx_version() is None:
            raise TrtuneError(f"backend {NAME!r} needs {DISTRIBUTION}, not installed: {REMEDY}")
        targets, plan = self.targets(), candidate.plan
        old = [found for found in targets if found in WITHOUT_INT8]
        if old and plan.quantized_nodes:
            raise ConfigError(
                f"backends: {NAME}: compute_capabilities: TensorRT-RTX has no INT8 for {old[0]}, "
                "and an engine that includes it would be float for every GPU; take it out, or "
                "set precision.default: fp16"
            )
        none = without_float8(targets)
        if none and plan.fp8_nodes:
            raise ConfigError(
                f"backends: {NAME}: compute_capabilities: GPUs of {none[0]} have no FP8 "
                "(8.9 and up do); take it out, or pin those nodes to int8"
            )
        profiles = model_profiles(candidate.model, self.shapes, batch=self.batch)
        with scratch(folder) as place:
            built, refused = self._best(candidate, targets, profiles, place)
            (folder / ENGINE_JSON).unlink(missing_ok=True)
            with atomic_path(folder / PLAN_FILE) as target:
                for file in (*built.folder.glob(f"{MODEL_FILE}*"), built.folder / LOG_FILE):
                    shutil.move(file, target.parent / file.name)
                shutil.move(built.folder / PLAN_FILE, target)
        info = self._info(candidate, folder, built, refused, targets, profiles)
        info = replace(info, seconds=time.perf_counter() - start)
        write_engine_json(folder, info, candidate)
        return info

    def _best(
        self,
        candidate: Candidate,
        targets: Sequence[str],
        profiles: Mapping[str, Profile],
        place: Path,
    ) -> tuple[_Built, dict[str, str]]:
        """The build that has most as planned, and node -> words of the compiler that refused it."""
        plan = without_float_only(candidate.model.proto, candidate.plan)
        guards: tuple[str, ...] = ()
        refused: dict[str, str] = {}
        best: _Built | None = None
        for number in range(MOST_BUILDS):
            work = place / str(number)
            try:
                built = self._attempt(candidate, plan, guards, targets, profiles, work)
            except BuildError as error:
                nodes = refused_nodes(error.problems, plan)
                if best is not None:
                    return best, refused
                if not nodes:
                    raise
                log.warning("%s refuses %s as planned: built again without", NAME, ", ".join(nodes))
                refused.update(nodes)
                plan = unquantized(plan, nodes)
                continue
            if best is not None:
                return max(best, built, key=_as_planned), refused
            guards = torn_apart(candidate.model.proto, plan, built.precisions)
            if not guards:
                return built, refused
            log.info("%s took %s apart: built again behind a Clip", NAME, ", ".join(guards))
            best = built
        if best is None:
            raise TrtuneError(
                f"{NAME}: {MOST_BUILDS} builds were refused, each for another node "
                f"({', '.join(refused)}); pin more of them to fp32 or fp16 in precision.pin"
            )
        return best, refused

    @staticmethod
    def lowered(candidate: Candidate) -> onnx.ModelProto:
        """The Q/DQ model that `build` gives to the compiler, before any repair."""
        table = candidate.table or CalibrationTable({})
        plan = without_float_only(candidate.model.proto, candidate.plan)
        return lower_emulate(candidate.model, plan, table)

    def _attempt(
        self,
        candidate: Candidate,
        plan: PrecisionPlan,
        guards: tuple[str, ...],
        targets: Sequence[str],
        profiles: Mapping[str, Profile],
        work: Path,
    ) -> _Built:
        work.mkdir()
        proto = self.lowered(replace(candidate, plan=plan))
        insert_guards(proto, guards)
        save_model(proto, work / MODEL_FILE, candidate.model.external_dir)
        request = self._request(work / MODEL_FILE, work, targets, profiles)
        build_in_child(request, work, timeout=self.timeout, opset=default_opset(proto) or 0)
        text = (work / LOG_FILE).read_text("utf-8", errors="replace")
        kernels = read_kernels(text)
        nodes = [name for name, a in plan.nodes.items() if a.role != SHAPE]
        ops = {node.name: node.op_type for node in candidate.model.proto.graph.node}
        multiply = frozenset(n for n in plan.compute_nodes if ops[n] not in ELEMENTWISE_OPS)
        codes = read_as_codes(proto.graph, plan.quantized_nodes)
        found = accounts(kernels, nodes, compute=multiply, elementwise=codes)
        return _Built(work, plan, guards, found, kernels is not None)

    def _request(
        self, model: Path, work: Path, targets: Sequence[str], profiles: Mapping[str, Profile]
    ) -> Request:
        """What the child is to make of `model`, in the folder `work`."""
        return Request(
            model=str(model),
            plan=str(work / PLAN_FILE),
            log=str(work / LOG_FILE),
            answer=str(work / "answer.json"),
            compute_capabilities=targets,
            profiles={name: profile.to_json() for name, profile in profiles.items()},
            workspace=self.workspace,
            optimization_level=self.optimization_level,
            tf32=self.tf32,
        )

    def _info(
        self,
        candidate: Candidate,
        folder: Path,
        built: _Built,
        refused: Mapping[str, str],
        targets: Sequence[str],
        profiles: Mapping[str, Profile],
    ) -> BuildInfo:
        gpu = find_gpu()
        text = (folder / LOG_FILE).read_text("utf-8", errors="replace")

        def shell(model: Path) -> str:
            return build_command(
                str(model),
                PLAN_FILE,
                targets,
                profiles,
                workspace=self.workspace,
                optimization_level=self.optimization_level,
                tf32=self.tf32,
            )

        return BuildInfo(
            backend=self.name,
            path=folder / PLAN_FILE,
            size_bytes=(folder / PLAN_FILE).stat().st_size,
            precisions=built.precisions,
            not_honoured=complaints(
                candidate.plan, built.accounts, refused, readable=built.readable
            ),
            versions=self.versions,
            log="\n".join([line for line in text.splitlines() if line[:3] in LOG_MARKS][-20:]),
            reason=why_not(gpu, targets),
            details={
                "settings": self.settings,
                "compute_capabilities": list(targets),
                "profiles": {name: profile.to_json() for name, profile in profiles.items()},
                "gpu": gpu.name if gpu else None,
                "gpu_compute_capability": gpu.compute_capability if gpu else None,
                "driver": gpu.driver if gpu else None,
                "cuda": cuda_version(),
                "command": shell(Path(MODEL_FILE)),
                **self._whole(candidate.model, folder, targets, shell),
                "kernels": {
                    node: [kernel.name for kernel in account.kernels]
                    for node, account in built.accounts.items()
                    if account.kernels
                },
                "guarded": list(built.guards),
                "unquantized": list(refused),
            },
        )

    def _whole(
        self, model: Model, folder: Path, targets: Sequence[str], shell: Callable[[Path], str]
    ) -> dict[str, Any]:
        """What stands behind a cut, put back, and the engine of it; or which of its operators RTX
        lacks, or why else there is none."""
        found = write_whole(model, folder, shell)
        (folder / WHOLE_PLAN).unlink(missing_ok=True)  # of an earlier build
        if not found:
            return found
        told: dict[str, Any] = {"lacks": []}
        try:
            self._build_whole(model, folder, targets)
            told["engine"] = WHOLE_PLAN
        except TrtuneError as error:
            registry = importlib.import_module(NAME).get_plugin_registry()
            here = {creator.name for creator in registry.all_creators}
            told["lacks"] = [name for name in found["whole"]["operators"] if name not in here]
            if not told["lacks"]:
                alone = "" if find_gpu() else "; its plugins are made on a GPU, and none was found"
                told["reason"] = f"{error}{alone}"
            why = told.get("reason") or f"{NAME} has no {', '.join(told['lacks'])}"
            log.warning("no %s, the engine ends before: %s", WHOLE_PLAN, why)
        return {"whole": {**found["whole"], **told}}

    def _build_whole(self, model: Model, folder: Path, targets: Sequence[str]) -> None:
        """Build `whole.plan` from the `whole.onnx` in `folder`; raises as `build_in_child` does."""
        profiles = make_profiles(whole_inputs(model), self.shapes, batch=self.batch)
        with scratch(folder) as place:
            request = self._request(folder / WHOLE_FILE, place, targets, profiles)
            build_in_child(request, place, timeout=self.timeout, opset=model.opset)
            with atomic_path(folder / WHOLE_PLAN) as target:
                shutil.move(place / PLAN_FILE, target)

    def load(self, folder: Path) -> Engine:
        """The engine in `folder`, to be used in `with`.

        Raises TrtuneError if the folder holds none, or if it cannot run here, with the reason.
        """
        try:
            info = read_engine_json(folder)
            targets = info.details["compute_capabilities"]
        except (OSError, ValueError, KeyError) as error:
            raise TrtuneError(
                f"{folder} holds no built engine ({error}); build it first"
            ) from error
        if info.path is None or not info.path.is_file():
            raise TrtuneError(f"{folder} holds no {PLAN_FILE}; build it again")
        reason = why_not(find_gpu(), targets)
        if reason:
            raise TrtuneError(f"{info.path} cannot run here: {reason}")
        from trtune.precision.backends.gpu.engine import TrtEngine

        return TrtEngine(importlib.import_module(NAME), info.path, name=NAME)

    def doctor(self) -> Usable:
        """Whether engines can be built here, and whether they would run; never raises."""
        found = rtx_version()
        if found is None:
            return Usable(False, f"{DISTRIBUTION} is not installed", REMEDY)
        broken = why_not_loaded()
        if broken:
            reason = f"{NAME} is installed but cannot be loaded: {broken}"
            return Usable(False, reason, f"pip install --force-reinstall {DISTRIBUTION}", found)
        gpu = find_gpu()
        reason = why_not(gpu, (gpu.compute_capability,) if gpu else ())
        if not reason:
            return Usable(True, version=found)
        return Usable(
            True,
            f"builds here, but cannot run: {reason}",
            'name what to build for, such as compute_capabilities: ["8.9"]',
            found,
        )


def _as_planned(built: _Built) -> int:
    plan = built.plan
    return sum(built.accounts[n].precision == plan.precision(n) for n in plan.quantized_nodes)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A fresh folder inside `folder`, removed at the end; TrtuneError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=".building-", dir=folder)).resolve()
    except OSError as error:
        raise TrtuneError(
            f"cannot write into {folder}: {error.strerror or error}; choose another place with "
            "--out, or free some space"
        ) from error
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
