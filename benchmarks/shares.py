#!/usr/bin/env python3
"""A calibration shared out by Ray over two processes of a core each, beside one with two threads.

usage: shares.py [--data DIR] [--rounds N] [--times N] [MODEL]

Both count the same tensors of the same pictures, in turns, in one process that drives them; the
tables are compared byte for byte. Also told: how many bytes travel, by what.
"""

from __future__ import annotations

import argparse
import copyreg
import json
import pickle
import statistics
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trtune.calibrate.cache import dump_cache
from trtune.calibrate.collect import Collection, collect
from trtune.calibrate.histogram import Counter
from trtune.calibrate.methods import choose
from trtune.calibrate.table import CalibrationTable
from trtune.configs.sources import DataSet
from trtune.configs.system.cluster import _plain, connected
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

    def __init__(self, source: Any, times: int) -> None:
        self._source, self._times = source, times
        self.count = source.count * times
        self.identity = f"{times} times {source.identity}"

    def __iter__(self) -> Any:
        for _ in range(self._times):
            yield from self._source

    def part(self, start: int, stop: int) -> BatchSource:
        """The pictures `start` to `stop`; a part lies within one of the times."""
        size = self._source.count
        return self._source.part(start % size, (stop - 1) % size + 1)


def table_of(found: Collection) -> bytes:
    table = CalibrationTable.from_amax(choose(found.histograms, "entropy"))
    return dump_cache(table.scales, "TRT-101400-EntropyCalibration2").encode()


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


def main() -> None:
    from ray.cluster_utils import Cluster as Nodes

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="mobilenetv2_cifar10")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=4)
    asked = parser.parse_args()
    model = load_model(asked.data / "models" / f"{asked.model}.onnx")
    view = GraphView.of(model)
    tensors = list(place(view, make_plan(view)).activations)
    section = {
        "source": "arrays",
        "path": str(asked.data / "cifar10_test2000.npz"),
        "take": 1984,  # whole parts
        "preprocess": {"scale": 1 / 255},
    }
    source = Again(open_section(DataSet.model_validate(section), model.inputs), asked.times)
    head: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 1 << 28}
    nodes = Nodes(initialize_head=True, head_node_args={**head, "include_dashboard": False})
    nodes.add_node(**head)
    seconds: dict[str, list[float]] = {"one process": [], "ray": []}
    try:
        with connected(nodes.address) as cluster:
            for _ in range(asked.rounds):
                for name, given in (("one process", None), ("ray", cluster)):
                    began = time.perf_counter()
                    found = collect(model.proto, tensors, source, workers=2, cluster=given)
                    seconds[name].append(time.perf_counter() - began)
                    if given is None:
                        wanted = table_of(found)
                    elif table_of(found) != wanted:
                        raise SystemExit("the tables differ")
            part = next(iter(in_parts(source, 992)))
            moved = traffic(model, source, part, found)
    finally:
        nodes.shutdown()
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(json.dumps({"seconds": seconds, "pictures": source.count, "ratios": ratios,
                      "median": statistics.median(ratios), "bytes": moved}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
