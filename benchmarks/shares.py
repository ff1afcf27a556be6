#!/usr/bin/env python3
"""A calibration shared out by Ray over two processes of a core each, beside one with two threads.

usage: shares.py [--data DIR] [--rounds N] [--seconds S] [--limit S] [--kill] [MODEL]

Both count the same tensors of the same pictures, in turns, in one process that drives them; the
tables are compared byte for byte. A job is as many pictures as one process counts in `--seconds`,
which is found by trying. Before the first round the workers start and make their sessions on a
few pictures, timed by itself ("start"). `--kill` ends a worker in the middle of a further job, with
SIGKILL. No round begins that would end after `--limit` seconds; what was measured until then is
printed. Also told: how many bytes travel, by what.
"""

from __future__ import annotations

import argparse
import copyreg
import json
import os
import pickle
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trtune.calibrate.cache import Cache, dump_cache
from trtune.calibrate.collect import Collection, collect
from trtune.calibrate.cpu.counter import Counter
from trtune.calibrate.methods import choose
from trtune.calibrate.table import CalibrationTable
from trtune.configs.sources import DataSet
from trtune.configs.system.cluster import Cluster, _plain, connected
from trtune.datasets.batches import BatchSource
from trtune.datasets.open import open_section
from trtune.datasets.wrapped import in_parts
from trtune.precision.graph.file import load_model
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import place
from trtune.precision.plan.rules import make_plan


class Again:
    """Arrays a few times over: more pictures without more memory. A `BatchSource`."""

    skipped: tuple[str, ...] = ()

    def __init__(self, source: Any, start: int, stop: int) -> None:
        self._source, self._start, self._stop = source, start, stop
        self.count = stop - start
        self.identity = f"{start} to {stop} of {source.identity}"

    def __iter__(self) -> Any:
        size, at = self._source.count, self._start
        while at < self._stop:
            end = min(self._stop, at - at % size + size)
            yield from self._source.part(at % size, (end - 1) % size + 1)
            at = end

    def part(self, start: int, stop: int) -> BatchSource:
        """The pictures `start` to `stop`; of the arrays only the rows that it reads travel."""
        size, first = self._source.count, self._start + start
        if first // size == (self._start + stop - 1) // size:
            return self._source.part(first % size, (self._start + stop - 1) % size + 1)
        return Again(self._source, first, self._start + stop)


def table_of(found: Collection) -> bytes:
    table = CalibrationTable.from_amax(choose(found.histograms, "entropy"))
    return dump_cache(Cache("TRT-101400-EntropyCalibration2", table.scales)).encode()


def traffic(model: Any, source: Any, part: BatchSource, found: Collection) -> dict[str, int]:
    """Bytes of what goes to a node once, of a part, and of the counts that come back."""
    counter = Counter()
    copyreg.pickle(MappingProxyType, _plain)
    back = 0
    for histogram in found.histograms.values():
        counter._counts = histogram.counts
        back += len(pickle.dumps(counter))
    return {
        "model": model.proto.ByteSize(),
        "part": len(pickle.dumps(part)),
        "counts": back,
        "tensors": len(found.histograms),
    }


@dataclass
class Timed:
    """What was measured: seconds of each job, by who did it."""

    model: str
    load: float
    pictures: int = 0
    start: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"one process": [], "ray": []})
    killed: dict[str, Any] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def ratios(self) -> list[float]:
        return [b / a for a, b in zip(*self.seconds.values(), strict=False)]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@contextmanager
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes of one core on this machine; gone at the end."""
    from ray.cluster_utils import Cluster as Nodes

    head: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 1 << 28}
    nodes = Nodes(initialize_head=True, head_node_args={**head, "include_dashboard": False})
    try:
        nodes.add_node(**head)
        yield nodes.address
    finally:
        nodes.shutdown()


def workers() -> list[int]:
    """The processes on this machine in which Ray runs a task of ours."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            mine = folder.stat().st_uid == os.getuid()
        except OSError:
            continue
        if mine and words.startswith(b"ray::calibrate"):
            found.append(int(folder.name))
    return found


def kill_one(after: float, told: dict[str, Any]) -> None:
    """Kill a worker of a task, `after` seconds from now."""
    time.sleep(after)
    for pid in workers()[:1]:
        os.kill(pid, signal.SIGKILL)
        told["worker"] = f"killed after {after:.1f} s"


class Job:
    """The counting of one model's tensors, by one process or by a cluster."""

    def __init__(self, data: Path, name: str) -> None:
        self.model = load_model(data / "models" / f"{name}.onnx")
        view = GraphView.of(self.model)
        self.tensors = list(place(view, make_plan(view)).activations)
        section = {
            "source": "arrays",
            "path": str(data / "cifar10_test2000.npz"),
            "preprocess": {"scale": 1 / 255},
        }
        self.source = open_section(DataSet.model_validate(section), self.model.inputs)
        self.found: Collection | None = None

    def run(self, pictures: int, cluster: Cluster | None) -> tuple[float, bytes]:
        """Seconds, and the bytes of the table."""
        source = Again(self.source, 0, pictures)
        began = time.perf_counter()
        found = collect(self.model.proto, self.tensors, source, workers=2, cluster=cluster)
        seconds = time.perf_counter() - began
        self.found = found
        return seconds, table_of(found)

    def enough_for(self, seconds: float) -> int:
        """How many pictures one process counts in `seconds`, by a job of 1024 and one of 2048."""
        few, many = self.run(1024, None)[0], self.run(2048, None)[0]
        return max(1024, int(1024 * seconds / max(many - few, many / 4)) // 128 * 128)


def measure(job: Job, cluster: Cluster, asked: argparse.Namespace, told: Timed) -> None:
    """Rounds in turns, until there are enough or the time is up."""
    began = time.perf_counter()
    told.pictures = asked.pictures or job.enough_for(asked.seconds)
    told.start = job.run(64, cluster)[0]
    say(f"{told.pictures} pictures a job; workers started in {told.start:.1f} s")
    longest = 0.0
    for number in range(asked.rounds):
        if time.perf_counter() - began + longest > asked.limit:
            say(f"{asked.limit:.0f} s are up after {number} rounds")
            break
        tables = {}
        for name, given in (("one process", None), ("ray", cluster)):
            seconds, tables[name] = job.run(told.pictures, given)
            told.seconds[name].append(seconds)
            say(f"round {number + 1}: {name} {seconds:.1f} s")
        longest = max(longest, sum(found[-1] for found in told.seconds.values()))
        if len(set(tables.values())) > 1:
            raise SystemExit("the tables differ")
    if asked.kill and told.seconds["ray"]:
        middle = told.seconds["ray"][-1] / 2
        threading.Thread(target=kill_one, args=(middle, told.killed), daemon=True).start()
        seconds, table = job.run(told.pictures, cluster)
        told.killed |= {"seconds": seconds, "table is the same": table == tables["one process"]}
        say(f"with a worker killed: {told.killed}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="mobilenetv2_cifar10")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a job in one process")
    parser.add_argument("--pictures", type=int, help="of a job, instead")
    parser.add_argument("--limit", type=float, default=420.0, help="seconds for all rounds")
    parser.add_argument("--kill", action="store_true")
    asked = parser.parse_args()
    job, told = Job(asked.data, asked.model), Timed(asked.model, os.getloadavg()[0])
    try:
        with two_nodes() as address, connected(address) as cluster:
            measure(job, cluster, asked, told)
            assert job.found is not None
            part = next(iter(in_parts(Again(job.source, 0, told.pictures), 992)))
            told.bytes = traffic(job.model, job.source, part, job.found)
    finally:
        ratios = told.ratios()
        median = statistics.median(ratios) if ratios else None
        print(json.dumps({**vars(told), "ratios": ratios, "median": median}, indent=1), flush=True)


if __name__ == "__main__":
    main()
