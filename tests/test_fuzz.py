"""Damaged files end in an error that the user can act on, never in a traceback.

Each target takes a file that is right and changes some of it. The number of examples is small here;
`TRTUNE_FUZZ=100000 pytest -s tests/test_fuzz.py` runs as many as are wanted a target, others each
time, or with `--hypothesis-seed=N` always the same: so several processes can share the work. At the
end it says how many were tried.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import tinymodels
import tinyproject
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from trtune.calibrate.cache import read_cache
from trtune.configs.errors import InputError
from trtune.configs.load import load_config
from trtune.precision.graph.file import load_model
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.rules import make_plan
from trtune.precision.quantized.describe import inspect_model
from trtune.precision.quantized.migrate_pins import read_pins
from trtune.precision.runtime.errors import ErrorSums
from trtune.reports.accuracy import Evaluation
from trtune.run.pipeline import report
from trtune.run.stage import Need, Stage
from trtune.run.stages.layers import ERROR_SUMS
from trtune.run.stages.measuring import EVALUATION
from trtune.run.workspace import FOLDER, Workspace

EXAMPLES = int(os.environ.get("TRTUNE_FUZZ", "40"))
bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="TRTUNE_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
SOURCES = ("conv_relu", "branches", "quantized", "opset11", "constant_nodes")
TRIED: Counter[str] = Counter()
ODD: tuple[Any, ...] = (None, True, -1, 0, 1e308, "", "x" * 400, "\0", [], {}, {"a": 1}, [[]])


@pytest.fixture(scope="module", autouse=True)
def total() -> Iterator[None]:
    """Say at the end how many damaged files were tried."""
    yield
    parts = ", ".join(f"{name} {count}" for name, count in sorted(TRIED.items()))
    print(f"\n{TRIED.total()} damaged files: {parts}")


def said(error: InputError) -> None:
    """Fail if the user is told nothing."""
    assert str(error)


@st.composite
def damaged_models(draw: st.DrawFn) -> onnx.ModelProto:
    """A model of which up to three fields say something else."""
    proto = tinymodels.MODELS[draw(st.sampled_from(SOURCES))]()
    for _ in range(draw(st.integers(1, 3))):
        _damage(draw, proto)
    return proto


def _damage(draw: st.DrawFn, message: Any) -> None:
    """Change one field somewhere below `message`."""
    fields = [field for field, _ in message.ListFields()]
    if not fields:
        return
    field = draw(st.sampled_from(fields))
    value = getattr(message, field.name)
    repeated = not isinstance(value, (str, bytes)) and hasattr(value, "__len__")
    if repeated and draw(st.integers(0, 4)) == 0:
        del value[draw(st.integers(0, len(value) - 1))]
    elif field.message_type is not None:
        _damage(draw, draw(st.sampled_from(list(value))) if repeated else value)
    elif draw(st.integers(0, 4)) == 0:
        message.ClearField(field.name)
    else:
        old = value[0] if repeated else value
        numbers = st.sampled_from([0, 1, -1, 7, 99, 2**31 - 1, -(2**31)])
        if isinstance(old, str):
            new: Any = draw(st.sampled_from(["", "x", "input", "Conv", "\0"]))
        elif isinstance(old, bytes):
            new = old[: draw(st.integers(0, len(old)))] + draw(st.binary(max_size=5))
        elif isinstance(old, float):
            new = float(draw(st.sampled_from([0.0, -1.0, 1e38, float("nan"), float("inf")])))
        else:
            new = draw(numbers)
        if repeated:
            value[0] = new
            return
        try:
            setattr(message, field.name, new)
        except ValueError:
            message.ClearField(field.name)


@bounded
@given(damaged_models())
def test_models(tmp_path_factory: pytest.TempPathFactory, proto: onnx.ModelProto) -> None:
    TRIED["models"] += 1
    path = tmp_path_factory.getbasetemp() / "fuzzed.onnx"
    path.write_bytes(proto.SerializeToString())
    try:
        model = load_model(path)
        view = GraphView.of(model)
        plan = make_plan(view)
        inspect_model(model, {name: (a.precision, a.reason) for name, a in plan.nodes.items()})
    except InputError as error:
        said(error)


@bounded
@given(st.binary(max_size=200), st.integers(0, 1000))
def test_bytes_of_models(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, place: int
) -> None:
    TRIED["bytes of models"] += 1
    data = bytearray(tinymodels.conv_relu().SerializeToString())
    data[place : place + len(noise)] = noise
    path = tmp_path_factory.getbasetemp() / "bytes.onnx"
    path.write_bytes(bytes(data))
    try:
        GraphView.of(load_model(path))
    except InputError as error:
        said(error)


@st.composite
def damaged_text(draw: st.DrawFn, text: str) -> str:
    """`text` with some of it cut out, doubled, or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        new = draw(st.sampled_from(["", "x", ":", "{", "]", "\n", "\t", "-1", "1e999", "é", "\0"]))
        text = text[:start] + new + text[end:]
    return text


@bounded
@given(damaged_text(tinyproject.TEXT))
def test_configs(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    TRIED["configs"] += 1
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load_config(path)
    except InputError as error:
        said(error)


@pytest.mark.parametrize("key", ["extends", "model.path", "name"])
def test_a_name_that_is_too_long_for_any_file(key: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"version: 1\nname: a\nextends: {'x' * 400}\n" if key == "extends" else "")
    with pytest.raises(InputError):
        load_config(path, overrides=[] if key == "extends" else [f"{key}={'x' * 4000}"])


CACHE = "TRT-101401-EntropyCalibration2\ninput: 3c010a14\nconv: 3d010a14\nx: 0\n"


@bounded
@given(damaged_text(CACHE))
def test_caches(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    TRIED["caches"] += 1
    path = tmp_path_factory.getbasetemp() / "fuzzed.cache"
    path.write_text(text, encoding="utf-8")
    try:
        read_cache(path)
    except InputError as error:
        said(error)


PLAN = make_plan(GraphView(tinymodels.conv_relu())).to_json()


@st.composite
def damaged_json(draw: st.DrawFn, text: str) -> str:
    """The JSON `text` with one or two values replaced by something else."""
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 2))):
        where: Any = value
        while isinstance(where, (dict, list)) and where:
            keys = list(where) if isinstance(where, dict) else list(range(len(where)))
            key = draw(st.sampled_from(keys))
            inner = where[key]
            if not isinstance(inner, (dict, list)) or not inner or draw(st.booleans()):
                where[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
                break
            where = inner
    return json.dumps(value)


@bounded
@given(damaged_json(PLAN))
def test_plans(text: str) -> None:
    TRIED["plans"] += 1
    try:
        read_pins(text)
    except InputError as error:
        said(error)


KEPT = {
    "sums": Stage(
        "sums",
        {"model": "abc", "data": Need("d", {"data.path": "rows.npz"})},
        lambda folder: {"n_conv": ErrorSums(signal=4.0, noise=0.5, count=7)},
        ERROR_SUMS,
    ),
    "value": Stage(
        "value",
        {"model": "abc", "metric": None},
        lambda folder: Evaluation(metric="top1", value=0.5, samples=8),
        EVALUATION,
    ),
}


@bounded
@given(st.sampled_from(sorted(KEPT)), st.data())
def test_stage_files(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    TRIED["stage files"] += 1
    stage, folder = KEPT[name], tmp_path_factory.getbasetemp() / "stages-fuzzed"
    path = folder / FOLDER / f"{name}.json"
    path.unlink(missing_ok=True)  # what the example before left may say the same in other words
    whole = Workspace(folder).get(stage)
    text = path.read_text(encoding="utf-8")
    damage = damaged_json(text) if data.draw(st.booleans()) else damaged_text(text)
    path.write_text(data.draw(damage), encoding="utf-8")
    again = Workspace(folder)
    again.why(stage)
    assert again.get(stage) == whole
    assert Workspace(folder).holds(stage)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of a finished run's run.json."""
    from trtune.run.pipeline import run

    folder = tinyproject.write_project(tmp_path_factory.mktemp("fuzz"))
    record = run(tinyproject.config_of(folder), out=folder / "runs")
    return record.to_json()


@bounded
@given(data=st.data())
def test_run_records(
    tmp_path_factory: pytest.TempPathFactory, finished: str, data: st.DataObject
) -> None:
    TRIED["run records"] += 1
    path = tmp_path_factory.getbasetemp() / "run.json"
    path.write_text(data.draw(damaged_json(finished)), encoding="utf-8")
    try:
        report([path], formats=("md",))
    except InputError as error:
        said(error)


@pytest.mark.parametrize("word", ["a_graph", "a_tool", "a_node", "a_domain"])
def test_a_name_that_is_no_text(word: str, tmp_path: Path) -> None:
    proto = tinymodels.conv_relu()
    proto.graph.name, proto.producer_name = "a_graph", "a_tool"
    proto.graph.node[0].name, proto.graph.node[0].domain = "a_node", "a_domain"
    data = proto.SerializeToString().replace(word.encode(), b"\x80" + word[1:].encode())
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(InputError):
        load_model(tmp_path / "m.onnx")


def external(offset: str) -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", offset), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [tensor])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    proto.ir_version = 8
    return proto


@pytest.mark.parametrize("offset", ["-1", "x", "1e3", ""])
def test_an_offset_that_is_none(offset: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(16))
    (tmp_path / "m.onnx").write_bytes(external(offset).SerializeToString())
    with pytest.raises(InputError, match="external weight 'w'"):
        load_model(tmp_path / "m.onnx")


def test_a_constant_with_more_values_than_its_shape(tmp_path: Path) -> None:
    proto = tinymodels.conv_relu()
    (weight,) = (t for t in proto.graph.initializer if t.name == "conv1_b")
    del weight.dims[:]
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"constant 'conv1_b' of shape \[\]"):
        load_model(tmp_path / "m.onnx")
