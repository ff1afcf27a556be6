"""Networks as people ship them, from the file to the report."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
import tinyproject
import tinyqat
from onnx import TensorProto, helper

from trtune.calibrate.cache import read_cache
from trtune.configs.errors import ConfigError, ModelError
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.implicit import left_in_float
from trtune.precision.quantized.importing import import_quantized
from trtune.run.pipeline import calibrate, run, run_folder
from trtune.tools import init_config

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
RTX = 'backends=[{name: onnxruntime}, {name: tensorrt_rtx, compute_capabilities: ["8.9"]}]'


def detector(domain: str) -> onnx.ModelProto:
    net = tinymodels.Net()
    x = net.conv(net.input("x", ("N", 3, 8, 8)), "head", 3, 6)
    boxes = net.op("Reshape", x, net.const("s4", [0, -1, 4], np.int64), out="boxes")
    scores = net.op("Reshape", x, net.const("s2", [0, -1, 2], np.int64), out="scores")
    names = ["num", "det_boxes", "det_scores", "det_classes"]
    attributes = {"score_threshold": 0.25, "plugin_version": "1"}
    plugin = helper.make_node(
        "EfficientNMS_TRT", [boxes, scores], names, "nms", domain=domain, **attributes
    )
    net.nodes.append(plugin)
    int32 = TensorProto.INT32
    proto = net.model({"num": (("N", 1), int32), "det_boxes": ("N", 10, 4)})
    if domain:
        proto.opset_import.append(helper.make_opsetid(domain, 1))
    return proto


def project(folder: Path, proto: onnx.ModelProto) -> Path:
    """The project of `proto`, whose own rows are drawn for the part that onnxruntime runs."""
    tinyproject.write_project(folder, tinymodels.conv_relu(), labels=False)
    for seed, name in enumerate(("calibration", "evaluation")):
        np.savez(folder / f"{name}.npz", **tinyproject.draw(proto, 16, seed=seed))
    onnx.save(proto, folder / "net.onnx")
    return folder


@pytest.mark.parametrize("domain", ["TRT", ""])
def test_a_plugin_is_put_back_into_what_is_written(domain: str, tmp_path: Path) -> None:
    proto = detector(domain)
    config = tinyproject.config_of(project(tmp_path, proto), *([RTX] if HAS_RTX else []))
    record = run(config, out=tmp_path / "runs")
    assert record.status == "met"
    assert record.variants[-1].nodes["int8"] == 1
    assert any("cut before EfficientNMS_TRT" in note for note in record.notes)
    if not HAS_RTX:
        pytest.skip("the rest needs tensorrt-rtx")
    (path,) = run_folder(config, tmp_path / "runs").glob("tensorrt_rtx*/whole.onnx")
    whole = onnx.load(path)
    assert [info.name for info in whole.graph.output] == ["num", "det_boxes"]
    (plugin,) = (node for node in whole.graph.node if node.name == "nms")
    assert plugin == next(node for node in proto.graph.node if node.name == "nms")
    assert "DequantizeLinear" in [node.op_type for node in whole.graph.node]


def rois(op: str) -> onnx.ModelProto:
    """A convolution, and behind it an operator of TensorRT's own with inputs of its own."""
    net = tinymodels.Net()
    x = net.conv(net.input("x", ("N", 3, 16, 16)), "features", 3, 16)
    if op == "TRT_FloorDiv":
        inputs, shape, attributes = [net.input("by", ("N", 1, 1, 1))], ("N", 16, 16, 16), {}
    else:
        inputs = [net.input("rois", ("R", 4)), net.input("which", ("R",), TensorProto.INT32)]
        shape = ("R", 16, 4, 4)
        attributes = {
            "plugin_version": "2", "mode": 1, "output_height": 4, "output_width": 4,
            "sampling_ratio": 2, "spatial_scale": 1.0, "coordinate_transformation_mode": 1,
        }  # fmt: skip
    net.op(op, x, *inputs, out="y", name="plugin", **attributes)
    return net.model({"y": shape})


@pytest.mark.skipif(not HAS_RTX, reason="needs tensorrt-rtx")
@pytest.mark.parametrize("op", ["TRT_FloorDiv", "ROIAlign_TRT", "EfficientNMS_TRT"])
def test_rtx_builds_the_whole_where_it_has_the_operator(op: str, tmp_path: Path) -> None:
    proto = detector("") if op == "EfficientNMS_TRT" else rois(op)
    tinyproject.write_project(tmp_path, tinymodels.conv_relu(), labels=False)
    for name in ("calibration", "evaluation"):
        size = 8 if op == "EfficientNMS_TRT" else 16
        rows = np.random.default_rng(0).normal(size=(16, 3, size, size))
        np.savez(tmp_path / f"{name}.npz", x=rows.astype(np.float32))
    onnx.save(proto, tmp_path / "net.onnx")
    shapes = {n: {w: [4, *s] for w in ("min", "opt", "max")} for n, s in
              {"TRT_FloorDiv": {"by": (1, 1, 1)}, "ROIAlign_TRT": {"rois": (4,), "which": ()}}
              .get(op, {}).items()}  # fmt: skip
    config = tinyproject.config_of(tmp_path, RTX, f"model.shapes={json.dumps(shapes)}")
    record = run(config, out=tmp_path / "runs")
    assert record.status == "met"
    (folder,) = run_folder(config, tmp_path / "runs").glob("tensorrt_rtx*")
    told = json.loads((folder / "engine.json").read_text())["details"]["whole"]
    if op == "TRT_FloorDiv":
        assert (told["lacks"], told["engine"]) == ([], "whole.plan")
        assert (folder / "whole.plan").read_bytes()[:4] == b"vtrt"
    elif op == "EfficientNMS_TRT":
        assert told["lacks"] == ["EfficientNMS_TRT"]
    else:  # it is there, and made on a GPU alone
        assert told["lacks"] == []
        assert told.get("engine") or "its plugins are made on a GPU" in told["reason"]
    assert (folder / "whole.plan").is_file() == ("engine" in told)


def test_the_user_says_where_the_model_ends(tmp_path: Path) -> None:
    config = tinyproject.config_of(
        tinyproject.write_project(tmp_path, labels=False), "model.outputs=[relu2]"
    )
    record = run(config, out=tmp_path / "runs")
    (path,) = run_folder(config, tmp_path / "runs").glob("*emulate/model.onnx")
    assert [info.name for info in onnx.load(path).graph.output] == ["relu2"]
    assert record.status == "met"


@pytest.mark.parametrize("value", [-1, 0])
def test_a_batch_that_is_not_above_0_is_free(value: int, tmp_path: Path) -> None:
    proto = tinymodels.conv_relu()
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = value
    record = run(tinyproject.config_of(project(tmp_path, proto)), out=tmp_path / "runs")
    assert record.status == "met"


def test_weights_behind_constants_run_in_int8(tmp_path: Path) -> None:
    net = tinymodels.Net()
    x = net.input("x", ("N", 8, 64))
    w = net.op("Transpose", net.weight("w", 32, 64), out="t")
    half = net.const("h", np.random.default_rng(0).standard_normal((32, 4)), np.float16)
    v = net.op("Cast", half, out="v", to=TensorProto.FLOAT)
    x = net.op("Relu", net.op("MatMul", x, w, out="m"), out="r")
    proto = net.model({net.op("MatMul", x, v, out="y"): ("N", 8, 4)})
    record = run(tinyproject.config_of(project(tmp_path, proto)), out=tmp_path / "runs")
    assert record.variants[-1].nodes["int8"] == 2


@pytest.mark.parametrize("opset", [5, 6])
def test_an_old_opset_runs(opset: int, tmp_path: Path) -> None:
    net = tinymodels.Net(opset=opset)
    y = net.conv(net.input("x"), "c", 3, 8)
    net.op("Add", y, net.const("b", np.ones(8)), out="y", broadcast=1, axis=1)
    proto = net.model({"y": ("N", 8, 8, 8)})
    proto.ir_version = 4
    record = run(tinyproject.config_of(project(tmp_path, proto)), out=tmp_path / "runs")
    assert record.status == "met"


@pytest.mark.parametrize("default", ["int8", "fp16", "bf16"])
def test_a_quantized_model_is_told_to_be_imported(default: str, tmp_path: Path) -> None:
    folder = project(tmp_path, tinymodels.quantized())
    config = tinyproject.config_of(folder, f"precision.default={default}")
    with pytest.raises(ModelError, match=r"already quantized: .*`precision.default: qat`"):
        run(config, out=tmp_path / "runs")


def test_a_model_quantized_at_run_time_is_refused_by_init_and_run(tmp_path: Path) -> None:
    net = tinymodels.Net()
    x = net.input("x", ("N", 8))
    net.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], ["q", "s", "z"], "dynamic"))
    w = net.const("w", np.ones((8, 4)), np.int8)
    sums = net.op("MatMulInteger", "q", w, "z", out="sums")
    net.op("Mul", net.op("Cast", sums, out="f", to=TensorProto.FLOAT), "s", out="y")
    folder = project(tmp_path, net.model({"y": ("N", 4)}))
    with pytest.raises(ModelError, match="ranges found at run time"):
        run(tinyproject.config_of(folder), out=tmp_path / "runs")
    with pytest.raises(ModelError, match="ranges found at run time"):
        init_config(folder / "net.onnx", folder / "new.yaml")


def test_a_run_in_which_nothing_became_int8_is_not_met(tmp_path: Path) -> None:
    folder = tinyproject.write_project(tmp_path, labels=False)
    config = tinyproject.config_of(folder, "precision.pin={'re:.*': fp32}")
    record = run(config, out=tmp_path / "runs")
    assert record.status == "missed"
    assert any(note.startswith("no node runs in INT8: pinned by the user") for note in record.notes)


def test_a_cache_beside_a_qat_model_is_not_passed_over(tmp_path: Path) -> None:
    folder = project(tmp_path, tinymodels.quantized())
    (folder / "some.cache").write_text("TRT-101401-EntropyCalibration2\nx: 3c010a14\n")
    config = tinyproject.config_of(
        folder, "precision.default=qat", f"calibration.cache={folder}/some.cache"
    )
    with pytest.raises(ConfigError, match="this cache would not be read"):
        run(config, out=tmp_path / "runs")


def test_the_cache_of_a_qat_run_is_complete_for_tensorrt_10(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What follows from the scales of the Q/DQ stands in it too; the scales themselves stay."""
    caplog.set_level("INFO")
    folder = project(tmp_path, tinyqat.torch_residual())
    config = tinyproject.config_of(folder, "precision.default=qat")
    table = calibrate(config, out=tmp_path / "runs")
    (path,) = (tmp_path / "runs").glob("*/calibration.cache")
    imported = import_quantized(folder / "net.onnx")
    view = GraphView.of(imported.model)
    cache = read_cache(path)
    assert dict(cache.scales) == dict(table.scales)
    assert {t: cache.scales[t] for t in imported.table.scales} == dict(imported.table.scales)
    assert table.reads == imported.table.reads
    assert set(cache.scales) > set(imported.table.scales)
    before = left_in_float(view, imported.plan, imported.table.scales)
    assert list(before) == ["n_conv2", "n_logits"]
    assert left_in_float(view, imported.plan, cache.scales) == {"n_conv2": "conv2"}
    assert "in float under implicit quantization: n_conv2" in caplog.text


def test_the_cache_of_a_run_has_the_constants_that_tensorrt_10_asks_for(tmp_path: Path) -> None:
    net = tinymodels.Net()
    x = net.op("Conv", net.input("x", ("N", 3, 8, 8)), net.weight("w", 16, 3, 3, 3), out="c",
               kernel_shape=[3, 3], pads=[1] * 4)  # fmt: skip
    x = net.op("Mul", x, net.const("factor", np.float32(0.5)), out="m")
    folder = project(tmp_path, net.model({net.op("Relu", x, out="y"): ("N", 16, 8, 8)}))
    calibrate(tinyproject.config_of(folder), out=tmp_path / "runs")
    (path,) = (tmp_path / "runs").glob("*/calibration.cache")
    cache = read_cache(path)
    assert cache.scales["factor_output"] == np.float32(0.5) / np.float32(127)
    assert "w_output" not in cache.scales
    assert json.loads(path.with_name(f"{path.name}.json").read_text())["methods"]["factor_output"]
