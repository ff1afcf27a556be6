"""Work shared out over a Ray cluster: functions of plain values, done again where a node is lost.

    with connected("auto") as cluster:
        for number, found in cluster.each(count, [(shard,) for shard in shards], shared=(model,)):
            ...

Ray places the tasks, moves what they read and gives back, and repeats those whose worker or node
was lost. Nothing here decides where anything runs. Ray is imported when a cluster is asked for.
"""

from __future__ import annotations

import copyreg
import importlib
import logging
import os
import platform
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

from trtune.configs import errors
from trtune.configs.errors import ConfigError, TrtuneError
from trtune.configs.progress import Progress, silent
from trtune.configs.system.machine import CORES_VARIABLE, package_version

log = logging.getLogger(__name__)

RETRIES = 3
"""How often a task is begun again whose worker or node was lost."""
REACHED = 10.0
"""Seconds in which a cluster's address has to answer."""
WAIT = 0.5
"""Seconds between looks at what is done; a Ctrl-C is answered within this time."""
SAME = ("trtune", "onnxruntime", "onnx", "numpy")
"""What has to be the same on all nodes, for the numbers to be."""
ROOT = "trtune"


@dataclass(frozen=True, slots=True)
class _Done:
    """What a task gives: a value, or the user's error as its kind and words; and what it logged."""

    value: Any
    node: str
    versions: tuple[str, ...]
    logged: tuple[tuple[int, str, str], ...]
    error: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray cluster that this process is connected to.

    A task takes `cores` cores and `gpus` GPUs; `slots` of them run at a time.
    """

    address: str
    nodes: int
    cores: int
    slots: int
    gpus: int = 0

    def each(
        self,
        function: Callable[..., Any],
        tasks: Iterable[tuple[Any, ...]],
        *,
        shared: Sequence[Any] = (),
        what: str = "",
        gpu_type: str | None = None,
        on_cpu: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """The number and result of each of `tasks`, as they end: `function(*shared, *task)`.

        `function` is one of a module. What is `shared` goes to each node once; tasks are taken as
        there is room for them. `gpu_type` asks for a node with such a GPU, as Ray calls it
        ("H100"), `on_cpu` for no GPU where tasks of this cluster have one. Raises the TrtuneError
        of a task, or one for a task that was lost more than `RETRIES` times, or whose node has
        other versions than this one; whatever ends the loop, also Ctrl-C, ends the tasks too.
        """
        ray = _ray()
        options: dict[str, Any] = {"num_cpus": self.cores, "max_retries": RETRIES}
        if gpu_type is not None or (self.gpus and not on_cpu):
            options["num_gpus"] = 1
        if gpu_type is not None:
            options["accelerator_type"] = gpu_type
        remote = ray.remote(_task).options(name=what or function.__name__, **options)
        held = [ray.put(value) for value in shared]
        level = logging.getLogger(ROOT).getEffectiveLevel()
        left = enumerate(tasks)
        waiting: dict[Any, int] = {}
        try:
            while True:
                for number, task in islice(left, 2 * self.slots - len(waiting)):
                    waiting[remote.remote(function, task, self.cores, level, *held)] = number
                if not waiting:
                    return
                ended, _ = ray.wait(list(waiting), timeout=WAIT)
                for reference in ended:
                    number = waiting[reference]
                    value = _value(ray, reference, what)
                    del waiting[reference]
                    yield number, value
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)

    def map(
        self,
        function: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        *,
        shared: Sequence[Any] = (),
        what: str = "",
        progress: Progress = silent,
    ) -> list[Any]:
        """The results of `tasks` in their order; see `each`."""
        found: dict[int, Any] = {}
        for number, value in self.each(function, tasks, shared=shared, what=what):
            found[number] = value
            progress(what, len(found), len(tasks))
        return [found[number] for number in range(len(tasks))]


@contextmanager
def connected(address: str, *, gpu: bool = False) -> Iterator[Cluster]:
    """The cluster at `address`: "auto" for the one that runs here, or host:port, or ray://...

    "local" starts one on this machine for the time of the block. With `gpu` every task takes a GPU.
    Raises ConfigError if Ray is not installed or no cluster answers, TrtuneError for one without
    the GPUs that are asked for.
    """
    ray = _ray()
    # What is frozen holds its mappings in read-only views, which do not pickle by themselves.
    copyreg.pickle(MappingProxyType, _plain)
    mine = not ray.is_initialized()
    if mine:
        try:
            _reach(address)
            ray.init(
                address=address,  # "local" starts one beside any that runs here
                include_dashboard=None if address != "local" else False,
                log_to_driver=False,
                configure_logging=False,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ConfigError(
                f"runtime.ray: {address!r} does not answer ({' '.join(str(error).split())[:300]}); "
                "`ray start --head` starts a cluster on this machine, `ray start --address=HOST:"
                "PORT` adds a node to it; without runtime.ray everything runs in this process"
            ) from error
    try:
        found = _sized(address, ray.nodes(), gpu=gpu)
        log.info("ray: %d nodes, %d tasks at a time", found.nodes, found.slots)
        yield found
    finally:
        if mine:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError for a host and port that nobody listens at: Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHED).close()


def _sized(address: str, nodes: Sequence[dict[str, Any]], *, gpu: bool) -> Cluster:
    """A cluster of `nodes`, as Ray tells of them: a task has a GPU, or the cores of a small node.

    >>> nodes = [{"Alive": True, "Resources": {"CPU": c, "GPU": g}} for c, g in ((8, 2), (4, 0))]
    >>> _sized("auto", nodes, gpu=False)
    Cluster(address='auto', nodes=2, cores=4, slots=3, gpus=0)
    >>> _sized("auto", nodes, gpu=True)
    Cluster(address='auto', nodes=2, cores=4, slots=2, gpus=1)
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = [int(resources.get("CPU", 0)) for resources in alive]
    gpus = [int(resources.get("GPU", 0)) for resources in alive]
    if gpu and not sum(gpus):
        raise TrtuneError(
            f"runtime.ray: the cluster {address!r} has no GPU ({len(alive)} nodes, {sum(cpus)} "
            "cores), and runtime.device asks for one; take `device: cpu`, or start nodes with GPUs"
        )
    usable = [count for count in cpus if count]
    if not usable:
        raise TrtuneError(f"runtime.ray: no node of the cluster {address!r} has a core for tasks")
    if gpu:
        shares = [max(1, c // g) for c, g in zip(cpus, gpus, strict=True) if c and g]
        return Cluster(address, len(alive), min(shares, default=1), sum(gpus), 1)
    cores = min(usable)
    return Cluster(address, len(alive), cores, sum(count // cores for count in usable))


_KEPT: dict[str, Any] = {}


def job_key() -> str:
    """A key for `kept` that no other job has."""
    return uuid.uuid4().hex


def kept(key: str, make: Callable[[], Any]) -> Any:
    """In a worker: what `make` gives, or gave for the same key in the task before.

    Sessions and stored activations of a job serve all of its tasks; those of another are let go.
    """
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = make()
    return _KEPT[key]


def chunks(names: Sequence[Any], cluster: Cluster, *, least: int = 1) -> list[tuple[list[Any]]]:
    """`names` as tasks: every so manieth, so that each has some from everywhere.

    >>> chunks("abcdef", Cluster("", 1, 1, 1), least=2)
    [(['a', 'c', 'e'],), (['b', 'd', 'f'],)]
    """
    count = max(1, min(2 * cluster.slots, len(names) // least))
    return [(list(names[number::count]),) for number in range(count)]


def gpu_types() -> tuple[str, ...]:
    """The kinds of GPU in the cluster that this process is connected to, as Ray calls them."""
    prefix = "accelerator_type:"
    return tuple(
        sorted(n.removeprefix(prefix) for n in _ray().cluster_resources() if n.startswith(prefix))
    )


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            f"runtime.ray needs Ray, which cannot be imported ({error}): pip install 'trtune[ray]'"
        ) from error


def _plain(view: MappingProxyType[Any, Any]) -> tuple[Any, ...]:
    return _read_only, (dict(view),)


def _read_only(mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(mapping)


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[int, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.levelno, record.name, record.getMessage()))


def _task(
    function: Callable[..., Any], task: tuple[Any, ...], cores: int, level: int, *shared: Any
) -> _Done:
    """In a worker: `function` of what is shared and of the task, on `cores` cores."""
    copyreg.pickle(MappingProxyType, _plain)
    os.environ[CORES_VARIABLE] = str(cores)
    heard = _Heard()
    ours = logging.getLogger(ROOT)
    before = ours.level
    ours.addHandler(heard)
    ours.setLevel(level)
    value, error = None, None
    try:
        value = function(*shared, *task)
    except TrtuneError as found:
        kind = next(k for k in type(found).__mro__ if k.__module__ == errors.__name__)
        error = (kind.__name__, str(found))
    finally:
        ours.removeHandler(heard)
        ours.setLevel(before)
    return _Done(value, platform.node(), _versions(), tuple(heard.records), error)


def _versions() -> tuple[str, ...]:
    return tuple(package_version(name) for name in SAME)


def _value(ray: Any, reference: Any, what: str) -> Any:
    """What a task gave; its log lines go on in this process."""
    try:
        done: _Done = ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise  # a bug, with the worker's own traceback
    except ray.exceptions.RayError as error:
        raise TrtuneError(
            f"{what}: a task was lost {RETRIES + 1} times ({type(error).__name__}); if its node "
            "ran out of memory, give calibration.memory less, or tasks fewer cores"
        ) from error
    for level, name, text in done.logged:
        logging.getLogger(name).log(level, "%s: %s", done.node, text)
    if done.versions != _versions():
        told = [
            f"{name} {there} (here {here})"
            for name, there, here in zip(SAME, done.versions, _versions(), strict=True)
            if there != here
        ]
        raise TrtuneError(
            f"node {done.node} has {', '.join(told)}: install the same versions on all nodes, or "
            "their numbers cannot be put together"
        )
    if done.error is not None:
        kind, text = done.error
        raise getattr(errors, kind)(text)
    return done.value
