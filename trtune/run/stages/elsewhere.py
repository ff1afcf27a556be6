"""Engines for other GPUs than this machine's: one a compute capability, or one a type of GPU.

TensorRT-RTX needs no GPU to build, so an engine for each compute capability is a task on any node,
or is built here. TensorRT times its kernels on the GPU that the engine is for: each type of GPU is
a task on a node that has one. Tasks give back the files; those that are kept are not built again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from trtune.configs.errors import ConfigError, TrtuneError
from trtune.configs.progress import Progress, silent
from trtune.configs.runtimes import Backend as Section
from trtune.configs.runtimes import TensorRT, TensorRTRTX
from trtune.configs.system.cluster import Cluster, gpu_types
from trtune.precision.runtime.api import Backend, BuildInfo, Candidate
from trtune.precision.runtime.engine_json import read_engine_json
from trtune.run.backends import BackendFailed, backend_for
from trtune.run.stage import Stage, versions
from trtune.run.stages.engines import engine_form
from trtune.run.workspace import Workspace

Files = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class OtherGpu:
    """A GPU to build for: `name` as it stands in folder names, and what makes the backend.

    `gpu_type` is that which a node must have, or None where any node will do.
    """

    name: str
    section: Section
    shapes: Mapping[str, Any]
    batch: int
    gpu_type: str | None = None

    @property
    def folder(self) -> Path:
        """Where the engine stands, below the run's folder."""
        return Path(self.section.label.replace("/", "-")) / self.name

    def stage(self, candidate: Candidate, build: Callable[[Path], BuildInfo]) -> Stage[BuildInfo]:
        """The engine of `candidate` for this GPU, which `build` puts into its folder."""
        needs = {
            "model": candidate.model,
            "plan": candidate.plan,
            "scales": candidate.table,
            "backend": self.section,
            "shapes": self.shapes,
            "batch": self.batch,
            "gpu type": self.gpu_type,
            **versions("trtune", "onnx"),
        }
        name = f"engine-{self.section.label.replace('/', '-')}-{self.name}"
        place = self.folder
        return Stage(name, needs, lambda run: build(run / place), engine_form(place))


def targets_of(
    sections: Sequence[Section], shapes: Mapping[str, Any], batch: int
) -> list[OtherGpu]:
    """What the backends of a config ask for beside their one engine."""
    found = []
    for section in sections:
        if isinstance(section, TensorRTRTX) and section.apart:
            for name in dict.fromkeys(section.compute_capabilities):
                alone = section.model_copy(update={"compute_capabilities": (name,)})
                found.append(OtherGpu(name, alone, shapes, batch))
        elif isinstance(section, TensorRT):
            for name in dict.fromkeys(section.gpu_types):
                one = section.model_copy(update={"gpu_types": (name,)})
                found.append(OtherGpu(name, one, shapes, batch, gpu_type=name))
    return found


def by_backend(targets: Sequence[OtherGpu]) -> dict[str, list[OtherGpu]]:
    """The targets by the label of their backend."""
    found: dict[str, list[OtherGpu]] = {}
    for target in targets:
        found.setdefault(target.section.label, []).append(target)
    return found


def check_targets(targets: Sequence[OtherGpu], cluster: Cluster | None) -> None:
    """Raise ConfigError for a type of GPU that no node has, or without a cluster."""
    wanted = list(dict.fromkeys(t.gpu_type for t in targets if t.gpu_type is not None))
    if not wanted:
        return
    if cluster is None:
        raise ConfigError(
            f"backends: tensorrt: gpu_types {', '.join(wanted)}: engines for other GPUs are built "
            "on the nodes of a cluster; set runtime.ray, or take gpu_types out"
        )
    here = gpu_types()
    missing = [name for name in wanted if name not in here]
    if missing:
        has = f"its GPUs are {', '.join(here)}" if here else "it has no GPU"
        raise ConfigError(
            f"backends: tensorrt: gpu_types: no node of the cluster {cluster.address!r} has "
            f"{', '.join(missing)}: {has}"
        )


def build_engines(
    workspace: Workspace,
    candidate: Candidate,
    targets: Sequence[OtherGpu],
    cluster: Cluster | None = None,
    progress: Progress = silent,
) -> dict[str, BuildInfo]:
    """The engine for each of `targets`, which are of one backend, by the target's name.

    Those that were built for the same model, plan and table are reused. Raises BackendFailed for
    one that cannot be built, when the others of its task are kept.
    """
    stages = [target.stage(candidate, _not_built) for target in targets]
    missing = [t for t, s in zip(targets, stages, strict=True) if not workspace.holds(s)]
    for done, (target, files) in enumerate(_built(candidate, missing, cluster), 1):

        def write(folder: Path, files: Files = files) -> BuildInfo:
            return _written(files, folder)

        workspace.get(target.stage(candidate, write))
        progress("build engines", done, len(missing))
    return {t.name: workspace.get(stage) for t, stage in zip(targets, stages, strict=True)}


def _not_built(folder: Path) -> NoReturn:
    raise TrtuneError(f"{folder} holds no built engine; build it first")


def _built(
    candidate: Candidate, targets: Sequence[OtherGpu], cluster: Cluster | None
) -> Iterator[tuple[OtherGpu, Files]]:
    """The files of each engine, as they are done: those of one type of GPU, then of the next."""
    if cluster is None:
        for target in targets:
            with _naming(target):
                yield target, build_one(candidate, target)
        return
    for kind in dict.fromkeys(target.gpu_type for target in targets):
        alike = [target for target in targets if target.gpu_type == kind]
        tasks = [(target,) for target in alike]
        with _naming(alike[0]):
            for number, files in cluster.each(
                build_one, tasks, shared=(candidate,), what="build engines", gpu_type=kind,
                on_cpu=kind is None,
            ):  # fmt: skip
                yield alike[number], files


@contextmanager
def _naming(target: OtherGpu) -> Iterator[None]:
    """A TrtuneError in the block as that of the target's backend: the others go on."""
    try:
        yield
    except TrtuneError as error:
        raise BackendFailed(target.section.label) from error


def build_one(candidate: Candidate, target: OtherGpu) -> dict[str, bytes]:
    """In a worker, or here: the files of the engine of `candidate` for `target`, by name."""
    backend: Backend = backend_for(target.section, target.shapes, target.batch)
    state = backend.doctor()
    if not state.usable:
        raise TrtuneError(
            f"{backend.name} cannot build for {target.name} there: {state.reason}"
            + (f"; {state.remedy}" if state.remedy else "")
        )
    with tempfile.TemporaryDirectory(prefix="trtune-") as place:
        backend.build(candidate, Path(place))
        return {path.name: path.read_bytes() for path in Path(place).iterdir() if path.is_file()}


def _written(files: Files, folder: Path) -> BuildInfo:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return read_engine_json(folder)
