"""A local cluster of two nodes, a core each: the same numbers, also where a worker is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import raytasks
import tinymodels
import tinyproject

import trtune
from trtune.calibrate.collect import Collection, collect
from trtune.configs.errors import ConfigError, DataError, ModelError, TrtuneError
from trtune.configs.system.cluster import Cluster, chunks, connected, gpu_types
from trtune.datasets.arrays import ArraySource
from trtune.precision.graph.file import model_from_proto
from trtune.run.stages.elsewhere import check_targets
from trtune.run.work import targets_in

ray = pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A cluster of two nodes on this machine, to which more can be added."""
    from ray.cluster_utils import Cluster as Nodes

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # workers import `raytasks`
    head = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    more = {"object_store_memory": 100 << 20, "resources": {"accelerator_type:X1": 1}}
    for attempt in range(3):
        found = Nodes(head_node_args=head)
        try:
            found.add_node(**head)
            found.add_node(num_cpus=1, **more)
            break
        except Exception as error:  # a busy machine does not start a node within Ray's 30 s
            found.shutdown()
            if attempt == 2:
                pytest.skip(f"Ray does not start here: {error}")
    yield found
    found.shutdown()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def nodes(machines: Any) -> str:
    """Its address."""
    return str(machines.address)


@pytest.fixture(scope="module")
def cluster(nodes: str) -> Iterator[Cluster]:
    with connected(nodes) as found:
        yield found


def test_the_cluster_is_what_its_nodes_are(cluster: Cluster) -> None:
    assert (cluster.nodes, cluster.cores, cluster.slots, cluster.gpus) == (2, 1, 2, 0)
    assert gpu_types() == ("X1",)


def test_results_come_in_order_with_what_was_logged(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, int, int | None]] = []
    found = cluster.map(
        raytasks.where_i_run,
        [(n,) for n in range(5)],
        what="ask",
        progress=lambda *x: told.append(x),
    )
    assert [number for number, *_ in found] == [0, 1, 2, 3, 4]
    assert {cores for _, cores, _ in found} == {"1"}
    assert str(os.getpid()) not in {pid for *_, pid in found}
    assert told == [("ask", n, 5) for n in range(1, 6)]
    assert sorted(r.getMessage().split(": ")[-1] for r in caplog.records if "number" in r.message)[
        :2
    ] == ["number 0", "number 1"]


def test_the_error_of_a_task_is_that_of_a_user(cluster: Cluster) -> None:
    with pytest.raises(DataError, match="sample 3 is no picture"):
        cluster.map(raytasks.refuse, [(3,)])


def test_a_lost_worker_is_done_again(cluster: Cluster, tmp_path: Path) -> None:
    found = cluster.map(raytasks.die_once, [(n,) for n in range(4)], shared=(str(tmp_path),))
    assert found == [0, 1, 4, 9]
    assert (tmp_path / "died").exists()


def test_a_lost_node_is_done_again(machines: Any, cluster: Cluster, tmp_path: Path) -> None:
    """Three nodes work on tasks that wait for it, and one of them goes down."""
    third = machines.add_node(num_cpus=1, object_store_memory=100 << 20)
    begun = cluster.each(raytasks.wait_for, [(n,) for n in range(4)], shared=(str(tmp_path),))

    def lose() -> None:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("began*"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        machines.remove_node(third, allow_graceful=False)
        (tmp_path / "go").touch()

    losing = threading.Thread(target=lose)
    losing.start()
    found = dict(begun)
    losing.join()
    assert found == {0: 0, 1: 1, 2: 4, 3: 9}
    assert len(list(tmp_path.glob("began*"))) > 4  # what the node was doing has begun again


def test_a_task_that_is_lost_again_and_again_is_an_error(cluster: Cluster) -> None:
    with pytest.raises(TrtuneError, match="a task was lost 4 times"):
        cluster.map(raytasks.die, [(0,)], what="die")


def test_a_worker_keeps_what_the_tasks_of_a_job_share(cluster: Cluster) -> None:
    times = cluster.map(raytasks.counted_times, [(n,) for n in range(12)], shared=("job",))
    assert max(times) > 1
    assert chunks("abc", cluster) == [(["a"],), (["b"],), (["c"],)]


def test_whoever_stops_listening_stops_the_tasks(cluster: Cluster, tmp_path: Path) -> None:
    running = cluster.each(raytasks.sleep, [(n,) for n in range(4)], shared=(str(tmp_path),))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupted)
    signal.alarm(20)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(running)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    pids = [int(path.read_text()) for path in tmp_path.glob("began*")]
    assert pids
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(is_alive, pids))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.is_file() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_gpu_that_no_node_has_is_said(nodes: str, cluster: Cluster) -> None:
    with pytest.raises(TrtuneError, match=r"has no GPU \(2 nodes, 2 cores\)"):  # noqa: SIM117
        with connected(nodes, gpu=True):
            pass


def test_no_cluster_says_how_to_start_one() -> None:
    code = (
        "from trtune.configs.system.cluster import connected\nwith connected('127.0.0.1:1'): pass"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError: runtime.ray: '127.0.0.1:1' does not answer" in done.stderr
    assert "`ray start --head` starts a cluster" in done.stderr


def source(model: onnx.ModelProto, count: int = 70) -> ArraySource:
    rows = tinyproject.draw(model, count, seed=5)
    return ArraySource(rows, model_from_proto(model).inputs, batch=8)


def counts(found: Collection) -> dict[str, list[Any]]:
    return {
        name: [h.counts.tolist(), h.maximum, h.pictures.counts.tolist(), h.pictures.item,
               h.pictures.runner_up]
        for name, h in found.histograms.items()
    }  # fmt: skip


def tensors(model: onnx.ModelProto) -> list[str]:
    floats = {"Conv", "Relu", "Add", "MatMul", "Gemm", "Sigmoid", "Mul"}
    return [node.output[0] for node in model.graph.node if node.op_type in floats]


@pytest.mark.parametrize("name", ["residual", "attention", "fixed_batch", "silu_se"])
def test_histograms_are_those_of_one_process(cluster: Cluster, name: str) -> None:
    model = tinymodels.MODELS[name]()
    alone = collect(model, tensors(model), source(model))
    shared = collect(model, tensors(model), source(model), cluster=cluster)
    assert counts(shared) == counts(alone)
    assert shared.pictures == alone.pictures == 70


def test_nan_in_a_part_is_named(cluster: Cluster) -> None:
    model = tinymodels.residual()
    rows = tinyproject.draw(model, 40, seed=5)
    (array,) = rows.values()
    array[33] = 1e38
    given = ArraySource(rows, model_from_proto(model).inputs, batch=8)
    with pytest.raises(ModelError) as here:
        collect(model, tensors(model), given)
    with pytest.raises(ModelError, match="33"):
        collect(model, tensors(model), given, cluster=cluster)
    assert "33" in str(here.value)


EVERYTHING = ("calibration.method=auto", "calibration.prepare=auto", "calibration.holdout=6",
              "precision.target={metric: top1, max_drop: 0.0}", "precision.max_pins=2")  # fmt: skip


def test_a_whole_run_is_that_of_one_process(nodes: str, cluster: Cluster, tmp_path: Path) -> None:
    folder = tinyproject.write_project(tmp_path, tinymodels.silu_se())
    records, tables = [], []
    for where, overrides in (("alone", ()), ("ray", (f"runtime.ray={nodes}",))):
        config = trtune.load_config(folder / "tiny.yaml", overrides=[*EVERYTHING, *overrides])
        record = trtune.run(config, out=folder / where)
        records.append(record)
        run = next((folder / where).iterdir())
        tables.append((run / "calibration.cache").read_bytes())
        assert json.loads((run / "stages" / "alone.json").read_text())["value"]
    assert tables[0] == tables[1]
    alone, shared = ([(v.name, v.value, v.sqnr_db, v.pinned) for v in r.variants] for r in records)
    assert shared == alone


def test_a_run_goes_on_from_what_the_workspace_holds(
    nodes: str, cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped once the table is there, and again: what was made is reused, with Ray or without."""
    folder = tinyproject.write_project(tmp_path, tinymodels.residual())
    runs = folder / "runs"
    on_ray = [*EVERYTHING, f"runtime.ray={nodes}"]

    def stop(*_: object) -> None:
        if list(runs.glob("*/stages/evaluation*.json")) and list(runs.glob("*/calibration.cache")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trtune.run(
            trtune.load_config(folder / "tiny.yaml", overrides=on_ray), out=runs, progress=stop
        )
    (run,) = runs.iterdir()
    table = (run / "calibration.cache").read_bytes()
    stages = {path: path.stat().st_mtime_ns for path in (run / "stages").glob("*.json")}
    assert stages
    assert not (run / "run.json").exists()
    caplog.set_level("INFO", "trtune")
    caplog.clear()
    record = trtune.run(trtune.load_config(folder / "tiny.yaml", overrides=EVERYTHING), out=runs)
    assert "calibration: reused from" in caplog.text
    assert "calibrated" not in caplog.text
    assert (run / "calibration.cache").read_bytes() == table
    assert {path: path.stat().st_mtime_ns for path in stages} == stages
    caplog.clear()
    again = trtune.run(trtune.load_config(folder / "tiny.yaml", overrides=on_ray), out=runs)
    assert "ray: " in caplog.text
    assert "calibrated" not in caplog.text
    assert [(v.name, v.value) for v in again.variants] == [
        (v.name, v.value) for v in record.variants
    ]


BOTH = (
    "backends=[{name: onnxruntime}, "
    '{name: tensorrt_rtx, compute_capabilities: ["8.6", "8.9"], apart: true}]'
)


def test_engines_for_compute_capabilities_are_tasks(
    nodes: str, cluster: Cluster, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    folder = tinyproject.write_project(tmp_path, tinymodels.conv_relu())
    overrides = [BOTH, f"runtime.ray={nodes}"]
    config = trtune.load_config(folder / "tiny.yaml", overrides=overrides)
    record = trtune.run(config, out=folder / "runs")
    (run,) = (folder / "runs").iterdir()
    (tuned,) = (v for v in record.variants if v.engines)
    for name in ("8.6", "8.9"):
        told = json.loads((run / "tensorrt_rtx" / name / "engine.json").read_text())
        assert told["details"]["compute_capabilities"] == [name]
        assert (run / tuned.engines[name]).stat().st_size


def test_a_type_of_gpu_that_no_node_has_is_said(cluster: Cluster, tmp_path: Path) -> None:
    folder = tinyproject.write_project(tmp_path)
    backends = "backends=[{name: onnxruntime}, {name: tensorrt, gpu_types: [X1, L4]}]"
    targets = targets_in(tinyproject.config_of(folder, backends))
    with pytest.raises(ConfigError, match=r"no node of the cluster .* has L4: its GPUs are X1"):
        check_targets(targets, cluster)
    check_targets(targets[:1], cluster)


def test_ctrl_c_leaves_nothing_running(tmp_path: Path) -> None:
    """A run with a cluster of its own, stopped once that has workers."""
    folder = tinyproject.write_project(tmp_path, tinymodels.residual(), calibration=400)
    command = [sys.executable, "-m", "trtune", "run", str(folder / "tiny.yaml"), "--out",
               str(folder / "runs"), "--set", "runtime.ray=local"]  # fmt: skip
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    started: dict[int, bytes] = {}
    while run.poll() is None and time.monotonic() < deadline:
        started |= below(run.pid)
        if any(map(is_worker, started.values())):
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    run.wait(timeout=60)
    assert any(map(is_worker, started.values()))
    assert any(b"raylet" in words for words in started.values())
    assert run.returncode not in (0, 3)
    deadline = time.monotonic() + 30
    while any(map(is_alive, started)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [words for pid, words in started.items() if is_alive(pid)]


def is_worker(words: bytes) -> bool:
    return words.startswith(b"ray::") and b"Agent" not in words


def below(pid: int) -> dict[int, bytes]:
    """The processes that `pid` and its children started, with their command lines."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue
        parents.setdefault(int(stat.rsplit(")", 1)[1].split()[1]), []).append(int(folder.name))
    found: dict[int, bytes] = {}
    waiting = list(parents.get(pid, []))
    while waiting:
        child = waiting.pop()
        waiting += parents.get(child, [])
        try:
            found[child] = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
    return found
