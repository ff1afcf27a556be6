from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import TensorProto, helper

from trtune.configs.errors import ModelError
from trtune.precision.graph.cut import whole
from trtune.precision.graph.file import comparable, load_model, model_from_proto
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.rules import make_plan


def detector(
    domain: str = "TRT", op: str = "EfficientNMS_TRT", *, opset: int = 17
) -> onnx.ModelProto:
    """A detector that ends in a plugin of TensorRT, as exporters for it write one."""
    net = tinymodels.Net(opset=opset)
    x = net.conv(net.input("x", ("N", 3, 8, 8)), "head", 3, 6)
    boxes = net.op("Reshape", x, net.const("s4", [0, -1, 4], np.int64), out="boxes")
    rows = net.op("Reshape", x, net.const("s2", [0, -1, 2], np.int64), out="rows")
    scores = net.op("Sigmoid", rows, out="scores")
    names = ["num", "det_boxes", "det_scores", "det_classes"]
    attributes = {"score_threshold": 0.25, "plugin_version": "1"}
    plugin = helper.make_node(op, [boxes, scores], names, "nms", domain=domain, **attributes)
    net.nodes.append(plugin)
    last = net.op("Cast", "num", out="count", to=TensorProto.FLOAT)
    proto = net.model({last: ("N", 1), "det_boxes": ("N", 10, 4), "det_scores": ("N", 10)})
    if domain:
        proto.opset_import.append(helper.make_opsetid(domain, 1))
    return proto


def saved(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("domain", ["TRT", "", "my.plugins"])
@pytest.mark.parametrize("op", ["EfficientNMS_TRT", "BatchedNMSDynamic_TRT", "MyOwnPlugin"])
def test_the_model_ends_before_the_plugin(domain: str, op: str, tmp_path: Path) -> None:
    model = load_model(saved(detector(domain, op), tmp_path))
    assert [spec.name for spec in model.outputs] == ["boxes", "scores"]
    assert model.tail is not None
    assert model.tail.operators == (op,)
    assert [node.name for node in model.tail.nodes] == ["nms", "n_count"]
    assert any(op in note for note in model.notes)
    assert make_plan(GraphView.of(model)).int8_nodes == ("n_head",)
    onnx.checker.check_model(model.proto, full_check=True)


@pytest.mark.parametrize("domain", ["TRT", ""])
@pytest.mark.parametrize("opset", [11, 17])
def test_put_back_it_is_the_file_again(domain: str, opset: int) -> None:
    proto = detector(domain, opset=opset)
    model = model_from_proto(proto)
    assert model.tail is not None
    again = whole(model.proto, model.tail)
    assert [o.name for o in again.graph.output] == [o.name for o in proto.graph.output]
    assert list(again.graph.input) == list(proto.graph.input)
    old = {node.name: node for node in proto.graph.node}
    plugin = next(node for node in again.graph.node if node.name == "nms")
    assert plugin == old["nms"]
    assert {node.name for node in again.graph.node} >= set(old)
    domains = {entry.domain for entry in again.opset_import}
    assert domains == {entry.domain for entry in proto.opset_import}


def test_the_file_up_to_the_cut_is_what_it_is_compared_with(tmp_path: Path) -> None:
    model = load_model(saved(detector(""), tmp_path))
    reference = comparable(model)
    assert isinstance(reference, onnx.ModelProto)
    inputs = tinymodels.feeds(model.proto)
    expected, found = tinymodels.run(reference, inputs), tinymodels.run(model.proto, inputs)
    for name in ("boxes", "scores"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_model_that_is_whole_is_compared_with_its_file(tmp_path: Path) -> None:
    path = saved(tinymodels.conv_relu(), tmp_path)
    assert comparable(load_model(path)) == path


def test_an_opset_that_onnxruntime_has_no_operators_of_is_not_compared(tmp_path: Path) -> None:
    proto = tinymodels.conv_relu()
    proto.opset_import[0].version = 6
    assert comparable(load_model(saved(proto, tmp_path))) is None


def test_outputs_that_do_not_depend_on_the_plugin_stay() -> None:
    proto = detector()
    info = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ("N", None, 2))
    proto.graph.output.insert(0, info)
    model = model_from_proto(proto)
    assert [spec.name for spec in model.outputs] == ["scores", "boxes"]


def test_a_plugin_in_the_middle_takes_what_is_behind_with_it() -> None:
    net = tinymodels.Net()
    x = net.conv(net.input("x"), "first", 3, 8)
    net.nodes.append(helper.make_node("ROIAlign_TRT", [x, net.input("rois", (4, 4))], ["r"], "roi"))
    net.conv("r", "second", 8, 8)
    model = model_from_proto(net.model({"second": (None, 8, 8, 8)}))
    assert [node.name for node in model.proto.graph.node] == ["n_first"]
    assert [spec.name for spec in model.inputs] == ["x"], "only the plugin reads the other"
    assert model.tail is not None
    again = whole(model.proto, model.tail)
    assert [info.name for info in again.graph.input] == ["x", "rois"]
    assert {t.name for t in again.graph.initializer} >= {"second_w", "second_b"}


def test_a_plugin_right_behind_the_inputs_leaves_nothing() -> None:
    net = tinymodels.Net()
    net.nodes.append(helper.make_node("Mine", [net.input("x")], ["r"], "mine", domain="a.b"))
    net.conv("r", "y", 3, 8)
    proto = net.model({"y": (None, 8, 8, 8)})
    with pytest.raises(ModelError, match=r"mine \(Mine\) stands right behind the inputs"):
        model_from_proto(proto)
    assert len(model_from_proto(proto, fold="none").proto.graph.node) == 2


def test_names_that_the_lowering_took_are_changed_behind_the_cut() -> None:
    model = model_from_proto(detector())
    assert model.tail is not None
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model.proto)
    lowered.graph.node.append(helper.make_node("Identity", ["boxes"], ["num"], "nms"))
    again = whole(lowered, model.tail)
    names = [node.name for node in again.graph.node]
    assert len(set(names)) == len(names)
    made = [name for node in again.graph.node for name in node.output]
    assert len(set(made)) == len(made)
    cast = next(node for node in again.graph.node if node.op_type == "Cast")
    plugin = next(node for node in again.graph.node if node.op_type == "EfficientNMS_TRT")
    assert cast.input[0] == plugin.output[0] != "num"


def test_the_user_says_where_it_ends(tmp_path: Path) -> None:
    path = saved(detector(), tmp_path)
    model = load_model(path, outputs=["rows"])
    assert [spec.name for spec in model.outputs] == ["rows"]
    assert [node.name for node in model.proto.graph.node] == ["n_head", "n_rows"]
    assert model.tail is None
    assert model.sha256 != load_model(path).sha256, "nothing kept of the whole model fits"
    assert isinstance(comparable(model), onnx.ModelProto)


def test_an_output_that_nothing_makes_is_an_error() -> None:
    with pytest.raises(ModelError, match="no node makes a tensor 'score'; did you mean 'scores'"):
        model_from_proto(detector(), outputs=["score"])


def test_a_misspelt_operator_is_no_plugin() -> None:
    proto = tinymodels.conv_relu()
    proto.graph.node[1].op_type = "Rellu"
    with pytest.raises(ModelError, match=r"not valid ONNX: .*Rellu"):
        model_from_proto(proto)
