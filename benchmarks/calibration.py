#!/usr/bin/env python3
"""Time and memory of calibration beside plain inference and beside other tools.

    python benchmarks/calibration.py                           ours, on the CIFAR models
    python benchmarks/calibration.py --peers PEERS.py --all    and other tools on the same pictures

Every measurement is a process of its own. One of ours reads the model and the pictures, warms up
the compiled kernels, and then takes turns, `--repeats` times: plain onnxruntime FP32 inference over
the pictures (two threads, batches of 32), and calibration from batches to scales. The ratio is the
median of the ratios of a turn, so that a noisy machine hurts both sides alike. `--peers` names a
script that quantizes MODEL with TOOL METHOD and prints one JSON line with seconds and peak_rss_gb;
`--tools` chooses among them. onnxruntime's Entropy takes 20 GB on some models: it runs with `--all`
only, and not where less than that is free. `--whole` times all that a run does by default until it
has its table (calibration, auto, preparation) beside Model-Optimizer's entropy, each once; CPU
seconds are those of all cores, for a machine that does other work too. The data is found through
TRTUNE_DATA, or beside the checkout. Writes `results/calibration.md` and, with every number,
`results/calibration.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("TRTUNE_DATA", HERE.parents[1] / "shared" / "data"))
MODELS = ("resnet20_cifar10", "mobilenetv2_cifar10", "vit_cifar10", "efficientnet_b0_cifar10")
PEERS = (("ort", "MinMax"), ("modelopt", "max"), ("modelopt", "entropy"))
HUNGRY = (("ort", "Entropy"),)
HUNGRY_GB = 20
HEADER = ("model", "tool", "method", "pictures", "seconds", "x FP32 inference", "peak GB", "x ours")
WHOLE = (
    "model",
    "tool",
    "method",
    "pictures",
    "seconds",
    "CPU seconds",
    "peak GB",
    "ours by theirs",
)


def decoded(section: Any, inputs: Any) -> Any:
    """The pictures of a section of a config, decoded: that is nobody's time here."""
    from trtune.datasets import Batch
    from trtune.datasets.open import open_section

    batches = [
        Batch({n: a.copy() for n, a in b.feeds.items()}, b.items)
        for b in open_section(section, inputs)
    ]

    class Held:
        count = sum(map(len, batches))
        identity, skipped = "benchmark", ()

        def __iter__(self) -> Iterator[Batch]:
            return iter(batches)

    return Held()


def measure(name: str, method: str, pictures: int, repeats: int) -> dict[str, Any]:
    """Time one model in this process: medians of seconds, of turn-by-turn ratios, peak memory."""
    from trtune import load_config
    from trtune.precision.graph.view import GraphView, load_model
    from trtune.precision.plan.rules import make_plan
    from trtune.precision.runtime.session import make_session
    from trtune.precision.tune.scales import calibrate_model

    path = HERE / "configs" / f"{name}.yaml"
    take = min(pictures, load_config(path).data.calibration.take or pictures)
    overrides = [f"data.calibration.take={take}", "data.calibration.batch=32"]
    config = load_config(path, overrides=overrides)
    model = load_model(Path(config.model.path))
    view = GraphView.of(model)
    held = decoded(config.data.calibration, model.inputs)

    session = make_session(model.proto, threads=2)

    def infer() -> float:
        started = time.perf_counter()
        for batch in held:
            session.run(None, dict(batch.feeds))
        return time.perf_counter() - started

    def calibrate() -> float:
        started = time.perf_counter()
        calibrate_model(model, view, make_plan(view), held, method=method)
        return time.perf_counter() - started

    infer()
    calibrate()
    turns = [(infer(), calibrate()) for _ in range(repeats)]
    return {
        "model": name,
        "method": method,
        "pictures": held.count,
        "inference": statistics.median(plain for plain, _ in turns),
        "seconds": statistics.median(ours for _, ours in turns),
        "ratio": statistics.median(ours / plain for plain, ours in turns),
        "best_ratio": min(ours / plain for plain, ours in turns),
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def measure_whole(name: str) -> dict[str, Any]:
    """Time what a run does by default until it has its table, in this process: calibration, the
    ranges of method auto, preparation. Parts in seconds and in seconds of all cores' work.
    """
    from trtune import load_config
    from trtune.precision.graph.view import GraphView, load_model
    from trtune.precision.plan.rules import make_plan
    from trtune.precision.tune.prepared import prepare_model
    from trtune.precision.tune.scales import calibrate_model

    config = load_config(HERE / "configs" / f"{name}.yaml")
    model = load_model(Path(config.model.path))
    view = GraphView.of(model)
    plan = make_plan(view)
    held = decoded(config.data.calibration, model.inputs)

    parts: dict[str, list[float]] = {}
    last = [time.perf_counter(), time.process_time()]

    def progress(what: str, done: int, total: int | None) -> None:
        now = [time.perf_counter(), time.process_time()]
        spent = parts.setdefault(what, [0.0, 0.0])
        for k in range(2):
            spent[k] += now[k] - last[k]
        last[:] = now

    start = list(last)
    base = calibrate_model(model, view, plan, held, progress=progress)
    prepare_model(model, view, plan, held, base, progress=progress)
    return {
        "model": name,
        "method": "auto, prepared",
        "pictures": held.count,
        "seconds": time.perf_counter() - start[0],
        "cpu_seconds": time.process_time() - start[1],
        "parts": {what: [round(x, 1) for x in spent] for what, spent in parts.items()},
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def whole_rows(
    name: str, arguments: argparse.Namespace, numbers: list[dict[str, Any]]
) -> list[list[str]]:
    """Everything that we do by default beside Model-Optimizer's entropy, one after the other on the
    same cores, each in a process of its own."""
    found = in_own_process(["--measure-whole", name])
    numbers.append({"tool": "trtune", **found})
    memory = f"{found['peak_rss_gb']:.2f}"
    cpu = f"{found['cpu_seconds']:.1f}"
    pictures = str(found["pictures"])
    rows = [[name, "trtune", found["method"], pictures, f"{found['seconds']:.1f}", cpu, memory, ""]]
    if arguments.peers:
        idle = children_cpu()
        peer(arguments.peers, arguments.peer_python, name, "fp32", "-")
        loading = children_cpu() - idle
        before = children_cpu()
        result = peer(arguments.peers, arguments.peer_python, name, "modelopt", "entropy")
        if result is None:
            return [*rows, [name, "modelopt", "entropy", pictures, "failed", "", "", ""]]
        spent = children_cpu() - before - loading
        numbers.append({"tool": "modelopt", "cpu_seconds": spent, **result})
        ratio = (
            f"{found['seconds'] / result['seconds']:.2f}; CPU {found['cpu_seconds'] / spent:.2f}"
        )
        rows.append([
            name, "modelopt", "entropy", str(result["pictures"]), f"{result['seconds']:.1f}",
            f"{spent:.1f}", f"{result['peak_rss_gb']:.2f}", ratio,
        ])  # fmt: skip
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print(found["parts"], flush=True)
    return rows


def children_cpu() -> float:
    """Seconds of all cores' work of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ours(name: str, method: str, pictures: int, repeats: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    return in_own_process(["--measure", name, method, str(pictures), str(repeats)])


def in_own_process(options: list[str]) -> dict[str, Any]:
    """What this script prints with `options`."""
    command = [sys.executable, __file__, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(options)}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def available_gb() -> float:
    """Memory that a process can have now, in GB; infinity where Linux does not say."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return math.inf
    (line,) = (x for x in info.read_text("ascii").splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) / 1e6


def machine() -> str:
    """The processor, the cores, the load of the last minute, and the versions that matter."""
    from importlib.metadata import version

    names = Path("/proc/cpuinfo")
    lines = names.read_text("utf-8").splitlines() if names.is_file() else []
    cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    versions = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "numba", "numpy"))
    load = f"load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    shown = [cpu or platform.processor(), f"{os.cpu_count()} cores", load, platform.platform()]
    return f"{', '.join(x for x in shown if x)}; Python {platform.python_version()}, {versions}"


def peers_of(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """The other tools to run, each with its method."""
    if not arguments.peers:
        return []
    chosen = [*PEERS, *(HUNGRY if arguments.all else ())]
    if arguments.all and available_gb() < HUNGRY_GB:
        print(f"onnxruntime Entropy is left out: less than {HUNGRY_GB} GB are free")
        chosen = list(PEERS)
    return [(tool, method) for tool, method in chosen if tool in arguments.tools]


def peer(script: Path, python: str, name: str, tool: str, method: str) -> dict[str, Any] | None:
    """One run of another tool, or None if it failed (out of memory, say)."""
    command = [python, str(script), str(DATA / "models" / f"{name}.onnx"), tool, method]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    except subprocess.TimeoutExpired:
        return None
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else None


def rows_of(
    name: str, arguments: argparse.Namespace, numbers: list[dict[str, Any]]
) -> list[list[str]]:
    """The table's rows for one model, printed too; what was measured is added to `numbers`."""
    found = ours(name, arguments.method, 512, arguments.repeats)
    few = ours(name, arguments.method, 64, arguments.repeats)
    numbers += [{"tool": "trtune", **measured} for measured in (found, few)]
    best = f"{found['ratio']:.2f} (best {found['best_ratio']:.2f})"
    memory = f"{found['peak_rss_gb']:.2f} ({few['peak_rss_gb']:.2f} for 64 pictures)"
    pictures = str(found["pictures"])
    rows = [
        [name, "onnxruntime FP32", "", pictures, f"{found['inference']:.2f}", "1", "", ""],
        [name, "trtune", arguments.method, pictures, f"{found['seconds']:.2f}", best, memory, "1"],
    ]
    for tool, method in peers_of(arguments):
        result = peer(arguments.peers, arguments.peer_python, name, tool, method)
        numbers.append(result or {"tool": tool, "method": method, "model": name, "failed": True})
        if result is None:
            rows.append([name, tool, method, pictures, "failed", "", "", ""])
            continue
        seconds = result["seconds"]
        rows.append([
            name, tool, method, str(result["pictures"]), f"{seconds:.1f}",
            f"{seconds / found['inference']:.1f}", f"{result['peak_rss_gb']:.2f}",
            f"{seconds / found['seconds']:.1f}",
        ])  # fmt: skip
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        name, method, pictures, repeats = sys.argv[2:6]
        print(json.dumps(measure(name, method, int(pictures), int(repeats))))
        return
    if sys.argv[1:2] == ["--measure-whole"]:
        print(json.dumps(measure_whole(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="config names")
    parser.add_argument("--method", default="entropy", help="our method (auto for ImageNet)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="a script that runs other tools")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter for --peers")
    tools = sorted({tool for tool, _ in (*PEERS, *HUNGRY)})
    parser.add_argument("--tools", nargs="+", choices=tools, default=tools, help="of --peers")
    parser.add_argument("--all", action="store_true", help="also what takes 20 GB of memory")
    parser.add_argument("--whole", action="store_true", help="all that a run does until its table")
    parser.add_argument("--append", action="store_true", help="add to results/calibration.md")
    arguments = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"the models and pictures are not at {DATA}: set TRTUNE_DATA")
    title = f"Measured {time.strftime('%Y-%m-%d')} on {machine()}.\n"
    header, rows = (WHOLE, whole_rows) if arguments.whole else (HEADER, rows_of)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    numbers: list[dict[str, Any]] = []
    for name in arguments.models:
        lines += ["| " + " | ".join(row) + " |" for row in rows(name, arguments, numbers)]
    path = HERE / "results" / "calibration.md"
    path.parent.mkdir(exist_ok=True)
    before = path.read_text(encoding="utf-8") + "\n" if arguments.append and path.is_file() else ""
    heading = "" if before else "# Calibration: time and memory\n\n"
    path.write_text(before + heading + title + "\n" + "\n".join(lines) + "\n", encoding="utf-8")
    record = {"measured": title.strip(), "numbers": numbers}
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
