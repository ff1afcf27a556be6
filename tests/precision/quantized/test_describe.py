from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import helper, numpy_helper
from realdata import DATA, needs_data

from trtune.precision.graph.view import load_model, model_from_proto
from trtune.precision.quantized.describe import Inspection, NodeRow, inspect_model


def inspect(name: str) -> Inspection:
    return inspect_model(model_from_proto(tinymodels.MODELS[name](), Path("m.onnx")))


def test_a_plain_model_has_costs_and_no_problem() -> None:
    found = inspect("conv_relu")
    assert dict(found.ops) == {
        "Conv": 2, "Relu": 2, "Flatten": 1, "Gemm": 1, "GlobalAveragePool": 1,
    }  # fmt: skip
    assert list(found.ops)[:2] == ["Conv", "Relu"]
    assert found.macs == 16 * 64 * 27 + 32 * 16 * 144 + 320
    assert found.parameters == 448 + 4640 + 330
    assert found.weight_bytes == 4 * found.parameters
    assert (found.quantize_nodes, found.problems, found.notes) == (0, (), ())
    assert found.nodes[0] == NodeRow("n_conv1", "Conv", ("N", 16, 8, 8), 27648, 448)


def test_shared_weights_count_once() -> None:
    found = inspect("shared_weight")
    rows = {row.name: row.parameters for row in found.nodes}
    assert rows["n_conv1"] == rows["n_conv2"] == 2320
    assert found.parameters == 448 + 2320 + 170


def test_quantized_weights_take_one_byte_each() -> None:
    found = inspect("quantized")
    assert found.quantize_nodes == 3
    assert found.weight_bytes == 16 * 27 + 4 * 170


def test_a_plan_gives_precision_and_reason() -> None:
    model = model_from_proto(tinymodels.conv_relu())
    found = inspect_model(model, {"n_conv1": ("int8", "default")})
    assert (found.nodes[0].precision, found.nodes[0].reason) == ("int8", "default")
    assert (found.nodes[1].precision, found.nodes[1].reason) == (None, "")
    assert found.problems == ()


def test_a_plan_without_int8_says_why() -> None:
    model = model_from_proto(tinymodels.conv_relu())
    names = [node.name for node in model.proto.graph.node]
    found = inspect_model(model, dict.fromkeys(names, ("fp32", "pinned by the user")))
    assert found.problems == ("the plan runs no node in INT8: pinned by the user (3 nodes)",)
    assert inspect_model(model, {}).problems == ("the plan runs no node in INT8",)


def broken_weight() -> onnx.ModelProto:
    proto = tinymodels.conv_relu()
    tensor = proto.graph.initializer[0]
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return proto


def foreign_operator() -> onnx.ModelProto:
    net = tinymodels.Net()
    x = net.conv(net.input("input"), "conv", 3, 16)
    net.op("Relu", net.op("Mystery", x, out="odd", domain="com.example"), out="output")
    proto = net.model({"output": ("N", 16, 8, 8)})
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    return proto


@pytest.mark.parametrize(
    ("make", "problems"),
    [
        (
            tinymodels.nothing_quantizable,
            ["nothing to quantize: there is no Conv, ConvTranspose, Gemm, MatMul node"],
        ),
        (
            tinymodels.quantized,
            ["already quantized: 3 (n_x_q, n_x_dq, n_w) are Q/DQ nodes"],
        ),
        (
            tinymodels.half_weights,
            ["not every weighted node computes in float32 (float16: 1 (n_conv))"],
        ),
        (broken_weight, ["weights with NaN or infinite values: 1 (conv1_w)"]),
        (
            tinymodels.dynamic_weight,
            [
                "weights that are computed at run time, not constant: 1 (n_output)",
                "input 'kernel' fixes the batch at 4",
            ],
        ),
        (
            foreign_operator,
            [
                "operators that onnxruntime does not have: 1 (Mystery); the 2 nodes from there on "
                "are neither quantized nor compared",
            ],
        ),
        (tinymodels.branches, ["nodes inside 1 (n_chosen) are left as they are"]),
        (tinymodels.fixed_batch, ["input 'input' fixes the batch at 1"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_problems_are_named(make: Callable[[], onnx.ModelProto], problems: list[str]) -> None:
    found = inspect_model(model_from_proto(make())).problems
    assert len(found) == len(problems)
    for line, start in zip(found, problems, strict=True):
        assert line.startswith(start)


def test_long_lists_are_cut() -> None:
    net = tinymodels.Net()
    x = net.input("input")
    for k in range(5):
        x = net.op("Odd", x, out=f"x{k}", domain="com.example")
    net.conv(x, "output", 3, 16)
    proto = net.model({"output": ("N", 16, 8, 8)})
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    found = inspect_model(model_from_proto(proto, fold="none")).problems
    (problem,) = (line for line in found if "rank" in line)
    assert problem == "tensors of unknown rank: 5 (x0, x1, x2, ...)"


@pytest.mark.parametrize("name", sorted(tinymodels.MODELS))
def test_every_inspection_can_be_json(name: str) -> None:
    found = inspect(name)
    value = json.loads(json.dumps(found.to_dict()))
    assert value["macs"] == found.macs
    assert [row["name"] for row in value["nodes"]] == [row.name for row in found.nodes]
    assert [spec["name"] for spec in value["inputs"]] == [spec.name for spec in found.inputs]
    assert value["path"] == "m.onnx"


@needs_data
def test_a_real_model() -> None:
    assert DATA is not None
    found = inspect_model(load_model(DATA / "models" / "mobilenetv2_imagenet.onnx"))
    assert found.macs == pytest.approx(300.8e6, rel=1e-3)
    assert found.parameters == pytest.approx(3.4878e6, rel=1e-4)
    assert found.problems == ()
