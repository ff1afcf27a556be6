"""Sessions, the engine, and building: what onnxruntime is given and what it really runs."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tinymodels
from numpy.typing import NDArray
from ortquantized import quantized

from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import DataError, ModelError, TrtuneError
from trtune.configs.files import hash_file
from trtune.datasets.batches import InputSpec
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.graph.view import Model, model_from_proto
from trtune.precision.runtime import session as session_module
from trtune.precision.runtime.api import Candidate
from trtune.precision.runtime.engine_json import read_engine_json, reusable
from trtune.precision.runtime.errors import sqnr_db
from trtune.precision.runtime.session import OrtEngine, make_session


@dataclass(frozen=True)
class Plan:
    """As much of a precision plan as a backend asks for."""

    default: str
    pinned: dict[str, str] = field(default_factory=dict)
    compute_nodes: tuple[str, ...] = ()
    fp8_nodes: tuple[str, ...] = ()

    def precision(self, node: str) -> str:
        return self.pinned.get(node, self.default)

    @property
    def decisions(self) -> dict[str, object]:
        return {"default": self.default, "pinned": self.pinned}


def excluding(model: Model, plan: Plan, table: CalibrationTable) -> onnx.ModelProto:
    return quantized(model.proto, tuple(n for n, p in plan.pinned.items() if p != "int8"))


def unchanged(model: Model, plan: Plan, table: CalibrationTable) -> onnx.ModelProto:
    return model.proto


@pytest.fixture
def lowerings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., onnx.ModelProto]]:
    """The two lowerings the backend finds: `emulate` changes nothing, `deploy` is the quantizer."""
    made: dict[str, Callable[..., onnx.ModelProto]] = {"emulate": unchanged, "deploy": excluding}
    name = "trtune.precision.lower.emulate"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(LOWERINGS=made))
    return made


def candidate(make: Callable[[], onnx.ModelProto], plan: Plan) -> Candidate:
    table = CalibrationTable.from_amax({"input": 4.0})
    model = model_from_proto(make())
    plan = replace(plan, compute_nodes=tuple(node.name for node in model.proto.graph.node))
    return Candidate(model, plan, table)  # type: ignore[arg-type]


# Sessions


@pytest.mark.parametrize("optimize", ["none", "basic", "extended", "all"])
def test_marked_tensors_come_after_the_models_own_outputs(optimize: str) -> None:
    model = tinymodels.residual()
    before = model.SerializeToString(deterministic=True)
    session = make_session(
        model, outputs=["sum", "input", "logits", "conv1_w", "sum"], optimize=optimize, threads=1
    )
    assert [o.name for o in session.get_outputs()] == ["logits", "sum", "input", "conv1_w"]
    assert model.SerializeToString(deterministic=True) == before
    feeds = tinymodels.feeds(model)
    logits, total, echoed, _ = session.run(None, feeds)
    np.testing.assert_allclose(logits, tinymodels.run(model)["logits"], rtol=1e-4, atol=1e-5)
    assert total.shape == (2, 16, 8, 8)
    np.testing.assert_array_equal(echoed, feeds["input"])


@pytest.mark.parametrize("form", ["proto", "bytes", "path"])
def test_a_proto_bytes_and_a_path_give_the_same_session(form: str, tmp_path: Path) -> None:
    model = tinymodels.conv_relu()
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    source = {"proto": model, "bytes": path.read_bytes(), "path": path}[form]
    plain = make_session(source)
    marked = make_session(source, outputs=["conv2"])
    assert [o.name for o in plain.get_outputs()] == ["logits"]
    assert [o.name for o in marked.get_outputs()] == ["logits", "conv2"]
    feeds = tinymodels.feeds(model)
    np.testing.assert_allclose(
        plain.run(None, feeds)[0], marked.run(None, feeds)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("outputs", [(), ("conv2",)])
def test_external_weights_are_found_for_a_path_and_for_a_proto(
    outputs: tuple[str, ...], tmp_path: Path
) -> None:
    model = tinymodels.conv_relu()
    expected = tinymodels.run(model)["logits"]
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    light = onnx.load(path, load_external_data=False)
    for session in (
        make_session(path, outputs=outputs),
        make_session(light, outputs=outputs, external_dir=tmp_path),
        make_session(light.SerializeToString(), outputs=outputs, external_dir=tmp_path),
    ):
        got = session.run(["logits"], tinymodels.feeds(model))[0]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_weights_above_a_protobufs_limit_go_through_a_folder_that_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tinymodels.conv_relu()
    monkeypatch.setattr(session_module, "SAVE_LIMIT", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    session = make_session(model, outputs=["conv2"])
    assert list(tmp_path.iterdir()) == []
    got = session.run(None, tinymodels.feeds(model))
    np.testing.assert_allclose(got[0], tinymodels.run(model)["logits"], rtol=1e-4, atol=1e-5)
    assert got[1].shape == (2, 32, 4, 4)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(b"not a model", "cannot load the model: .*protobuf", id="not ONNX"),
        pytest.param(Path("/no/such.onnx"), "cannot load /no/such.onnx", id="no file"),
    ],
)
def test_what_onnxruntime_cannot_load_is_a_model_error(data: bytes | Path, expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        make_session(data)


def test_a_wrong_option_or_tensor_is_the_callers_mistake() -> None:
    model = tinymodels.conv_relu()
    with pytest.raises(ValueError, match=r"'relu3'; did you mean 'relu[12]'"):
        make_session(model, outputs=["relu3"])
    with pytest.raises(ValueError, match="known: none, basic, extended, all"):
        make_session(model, optimize="most")


def test_the_asked_number_of_threads_is_used() -> None:
    session = make_session(tinymodels.conv_relu(), threads=1)
    assert session.get_session_options().intra_op_num_threads == 1


def test_without_integer_kernels_the_float_node_stays_float() -> None:
    model = tinymodels.conv_relu()
    lowered = quantized(model, ("n_conv2", "n_relu2"))
    feeds = tinymodels.feeds(model, batch=8, seed=7)
    exact = make_session(lowered, optimize="none").run(None, feeds)[0]
    as_written = make_session(lowered).run(None, feeds)[0]
    replaced = make_session(lowered, integer_kernels=True).run(None, feeds)[0]
    assert sqnr_db(exact, as_written) > sqnr_db(exact, replaced)
    np.testing.assert_allclose(as_written, exact, rtol=1e-4, atol=1e-5)


# The engine


@pytest.mark.parametrize("name", sorted(set(tinymodels.MODELS) - {"duplicate_names"}))
def test_the_engine_gives_what_onnxruntime_gives(name: str) -> None:
    model = tinymodels.MODELS[name]()
    with OrtEngine(lambda: make_session(model, threads=1)) as engine:
        got = engine.infer(tinymodels.feeds(model))
        assert [spec.name for spec in engine.outputs] == list(got)
    expected = tinymodels.run(model)
    assert list(got) == list(expected)
    for output, array in expected.items():
        np.testing.assert_allclose(got[output], array, rtol=1e-4, atol=1e-5)


def test_inputs_and_outputs_have_numpys_names_for_their_types() -> None:
    with OrtEngine(make_session(tinymodels.int64_input(), outputs=["fc"])) as engine:
        assert engine.inputs == (InputSpec("ids", ("N", 6), "int64"),)
        assert engine.outputs[0] == InputSpec("logits", ("N", 10), "float32")
        assert engine.outputs[1].name == "fc"


def test_outputs_are_the_callers_to_keep() -> None:
    model = tinymodels.conv_relu()
    feeds = tinymodels.feeds(model)
    with OrtEngine(make_session(model, outputs=["input", "relu1"])) as engine:
        first = engine.infer(feeds)
        kept = {name: array.copy() for name, array in first.items()}
        second = engine.infer({"input": feeds["input"] + 1})
    assert not np.shares_memory(first["input"], feeds["input"])
    for name, array in first.items():
        assert not np.shares_memory(array, second[name])
        np.testing.assert_array_equal(array, kept[name])
        array += 1


@pytest.mark.parametrize(
    ("feeds", "expected"),
    [
        pytest.param({}, "input 'input' is missing .* which has nothing", id="nothing"),
        pytest.param(
            {"inputs": np.zeros((1, 3, 8, 8), np.float32)},
            "'input' is missing .* which has 'inputs'; did you mean 'inputs'",
            id="another name",
        ),
        pytest.param(
            {"input": np.zeros((1, 3, 8, 8), np.float64)},
            "'input' must be float32; the batch has float64",
            id="another dtype",
        ),
        pytest.param(
            {"input": np.zeros((1, 3, 8, 9), np.float32)},
            r"must have shape \['N', 3, 8, 8\]; the batch has \[1, 3, 8, 9\]",
            id="another size",
        ),
        pytest.param(
            {"input": np.zeros((3, 8, 8), np.float32)}, r"has \[3, 8, 8\]", id="another rank"
        ),
    ],
)
def test_feeds_that_do_not_fit_are_a_data_error(
    feeds: dict[str, NDArray[Any]], expected: str
) -> None:
    with (
        OrtEngine(make_session(tinymodels.conv_relu())) as engine,
        pytest.raises(DataError, match=expected),
    ):
        engine.infer(feeds)


def test_what_fails_inside_onnxruntime_is_reported_with_the_shapes(
    capfd: pytest.CaptureFixture[str],
) -> None:
    ids = np.full((1, 6), 99)
    with (
        OrtEngine(make_session(tinymodels.int64_input())) as engine,
        pytest.raises(DataError, match=r"cannot run the model on ids \(1, 6\): .*Gather"),
    ):
        engine.infer({"ids": ids})
    capfd.readouterr()


def test_an_engine_works_only_in_with_and_can_be_entered_again() -> None:
    model = tinymodels.mlp()
    engine = OrtEngine(lambda: make_session(model))
    for _ in range(2):
        with engine:
            assert engine.infer(tinymodels.feeds(model))["logits"].shape == (2, 10)
        with pytest.raises(ValueError, match="`with`"):
            engine.infer(tinymodels.feeds(model))


def test_polygraphy_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = tinymodels.mlp()
    with OrtEngine(make_session(model)) as engine:
        engine.infer(tinymodels.feeds(model))
    assert capfd.readouterr() == ("", "")


def test_an_output_that_is_no_tensor_is_refused_and_the_session_closed() -> None:
    net = tinymodels.Net()
    net.op("SequenceConstruct", net.input("input"), out="list")
    model = net.model({"list": ("N",)})
    kind = onnx.helper.make_tensor_sequence_value_info("list", onnx.TensorProto.FLOAT, None)
    model.graph.output[0].CopyFrom(kind)
    engine = OrtEngine(make_session(model))
    with pytest.raises(ModelError, match=r"output 'list' is a seq\(tensor\(float\)\)"), engine:
        pass


# Building

Lowerings = dict[str, Callable[..., onnx.ModelProto]]


def test_build_writes_a_valid_model_and_engine_json(lowerings: Lowerings, tmp_path: Path) -> None:
    backend = OnnxruntimeBackend("emulate", threads=1)
    made = candidate(tinymodels.conv_relu, Plan("int8", {"n_logits": "fp32"}))
    info = backend.build(made, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["engine.json", "model.onnx"]
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    assert info.backend == backend.name == "onnxruntime/emulate"
    assert info.size_bytes == (tmp_path / "model.onnx").stat().st_size
    assert info.precisions["n_conv1"] == "int8"
    assert info.precisions["n_logits"] == "fp32"
    assert info.not_honoured == ()
    assert info.versions["onnxruntime"] == ort.__version__
    value = json.loads((tmp_path / "engine.json").read_text())
    assert value["key"] == made.key
    assert value["hashes"] == made.hashes
    assert value["file_sha256"] == hash_file(tmp_path / "model.onnx")
    assert read_engine_json(tmp_path).precisions == info.precisions


def test_what_was_built_is_loaded_and_runs(lowerings: Lowerings, tmp_path: Path) -> None:
    backend = OnnxruntimeBackend(threads=1)
    backend.build(candidate(tinymodels.conv_relu, Plan("fp32")), tmp_path)
    model = tinymodels.conv_relu()
    with backend.load(tmp_path) as engine:
        got = engine.infer(tinymodels.feeds(model))["logits"]
    np.testing.assert_allclose(got, tinymodels.run(model)["logits"], rtol=1e-4, atol=1e-5)


def test_deploy_reports_what_really_runs_not_what_was_planned(
    lowerings: Lowerings, tmp_path: Path
) -> None:
    backend = OnnxruntimeBackend("deploy")
    plan = Plan("int8", {"n_conv1": "fp32", "n_relu1": "fp32"})
    info = backend.build(candidate(tinymodels.conv_relu, plan), tmp_path / "good")
    assert (info.precisions["n_conv1"], info.precisions["n_conv2"]) == ("fp32", "int8")
    assert info.not_honoured == ()
    lowerings["deploy"] = unchanged
    info = backend.build(candidate(tinymodels.conv_relu, plan), tmp_path / "bad")
    assert "n_conv2: planned int8, runs in fp32" in info.not_honoured
    assert not any(line.startswith("n_conv1:") for line in info.not_honoured)


def test_a_plan_without_int8_needs_no_table(lowerings: Lowerings, tmp_path: Path) -> None:
    tables: list[CalibrationTable] = []

    def lower(model: Model, plan: Plan, table: CalibrationTable) -> onnx.ModelProto:
        tables.append(table)
        return model.proto

    lowerings["emulate"] = lower
    made = Candidate(model_from_proto(tinymodels.mlp()), Plan("fp32"))  # type: ignore[arg-type]
    OnnxruntimeBackend().build(made, tmp_path)
    assert [dict(table.scales) for table in tables] == [{}]


@pytest.mark.parametrize("role", ["input", "output"])
@pytest.mark.parametrize("change", ["name", "dtype", "shape"])
def test_a_lowering_that_changes_inputs_or_outputs_is_refused(
    role: str, change: str, lowerings: Lowerings, tmp_path: Path
) -> None:
    def lower(model: Model, plan: Plan, table: CalibrationTable) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        (info,) = getattr(proto.graph, role)
        if change == "name":
            old, info.name = info.name, "other"
            for node in proto.graph.node:
                for names in (node.input, node.output):
                    names[:] = ["other" if name == old else name for name in names]
        elif change == "dtype":
            info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
        else:
            info.type.tensor_type.shape.dim[0].dim_value = 1
        return proto

    lowerings["emulate"] = lower
    with pytest.raises(TrtuneError, match=f"onnxruntime/emulate changed the {role}s of"):
        OnnxruntimeBackend().build(candidate(tinymodels.conv_relu, Plan("int8")), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lowering_that_makes_invalid_onnx_is_refused_with_the_checkers_words(
    lowerings: Lowerings, tmp_path: Path
) -> None:
    def lower(model: Model, plan: Plan, table: CalibrationTable) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        proto.graph.node[0].op_type = "Convolve"
        return proto

    lowerings["emulate"] = lower
    with pytest.raises(TrtuneError, match=r"invalid model .*Convolve"):
        OnnxruntimeBackend().build(candidate(tinymodels.conv_relu, Plan("int8")), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(None, "holds no built engine", id="nothing there"),
        pytest.param("{}", "holds no built engine", id="another json"),
        pytest.param("{", "holds no built engine", id="not json"),
    ],
)
def test_loading_from_a_folder_without_an_engine(
    content: str | None, expected: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "engine.json").write_text(content)
    with pytest.raises(TrtuneError, match=expected):
        OnnxruntimeBackend().load(tmp_path)


def test_loading_after_the_model_was_deleted(lowerings: Lowerings, tmp_path: Path) -> None:
    backend = OnnxruntimeBackend()
    backend.build(candidate(tinymodels.mlp, Plan("fp32")), tmp_path)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(TrtuneError, match="holds no model file"):
        backend.load(tmp_path)


def test_doctor_finds_onnxruntime_usable() -> None:
    usable = OnnxruntimeBackend().doctor()
    assert (usable.usable, usable.version, usable.reason) == (True, ort.__version__, "")


# Reuse


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param("nothing", "reusing onnxruntime/emulate", id="the same: reused"),
        pytest.param("plan", "something else: plan changed", id="another plan"),
        pytest.param("versions", "something else: versions changed", id="another version"),
        pytest.param("backend", "something else: backend changed", id="another lowering"),
        pytest.param("file", "something else: engine file changed", id="an edited model"),
        pytest.param("gone", "something else: engine file changed", id="a deleted model"),
        pytest.param("json", "cannot be read", id="a broken engine.json"),
    ],
)
def test_a_build_is_reused_only_if_nothing_changed(
    change: str,
    message: str,
    lowerings: Lowerings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = OnnxruntimeBackend()
    made = candidate(tinymodels.mlp, Plan("int8"))
    info = backend.build(made, tmp_path)
    name, versions = backend.name, backend.versions
    if change == "plan":
        made = candidate(tinymodels.mlp, Plan("int8", {"n_fc1": "fp32"}))
    elif change == "versions":
        versions["onnxruntime"] = "0.1"
    elif change == "backend":
        name = "onnxruntime/deploy"
    elif change == "file":
        with (tmp_path / "model.onnx").open("ab") as handle:
            handle.write(b"x")
    elif change == "gone":
        (tmp_path / "model.onnx").unlink()
    elif change == "json":
        (tmp_path / "engine.json").write_text("{")
    with caplog.at_level(logging.INFO):
        found = reusable(tmp_path, made, backend=name, versions=versions)
    assert message in caplog.text
    if change == "nothing":
        assert found is not None
        assert (found.path, found.precisions) == (info.path, info.precisions)
    else:
        assert found is None
