from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import TensorProto, helper, numpy_helper

from trtune.configs.errors import ModelError
from trtune.precision.graph.normalise import name_nodes, normalise

RUNNABLE = sorted(set(tinymodels.MODELS) - {"duplicate_names"})  # onnxruntime refuses that one


@pytest.mark.parametrize("name", RUNNABLE)
def test_normalising_keeps_values_inputs_and_outputs(name: str) -> None:
    original = tinymodels.MODELS[name]()
    model, _ = normalise(original)
    onnx.checker.check_model(model, full_check=True)
    constants = {tensor.name for tensor in original.graph.initializer}
    assert list(model.graph.input) == [i for i in original.graph.input if i.name not in constants]
    assert list(model.graph.output) == list(original.graph.output)
    inputs = tinymodels.feeds(original)
    expected, found = tinymodels.run(original, inputs), tinymodels.run(model, inputs)
    for output, values in expected.items():
        np.testing.assert_allclose(found[output], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(tinymodels.MODELS))
def test_normalising_again_changes_nothing(name: str) -> None:
    model, _ = normalise(tinymodels.MODELS[name]())
    again, notes = normalise(model)
    assert notes == ()
    assert again == model


def test_the_given_model_is_not_touched() -> None:
    original, untouched = tinymodels.unnamed_nodes(), tinymodels.unnamed_nodes()
    normalise(original)
    assert original == untouched


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        pytest.param("conv_relu", (), id="nothing to do"),
        pytest.param(
            "opset11",
            ("opset 11 upgraded to 13", "3 Constant nodes became initializers"),
            id="old opset",
        ),
        pytest.param(
            "constant_nodes",
            ("4 Constant and 2 Identity nodes became initializers",),
            id="Constant nodes and an Identity of an Identity of one",
        ),
        pytest.param(
            "initializer_inputs",
            ("6 initializers were also inputs; now they are constants",),
            id="initializers among the inputs",
        ),
        pytest.param(
            "unsorted_nodes",
            ("nodes sorted, so that each stands behind those it reads from",),
            id="unsorted nodes",
        ),
        pytest.param("unnamed_nodes", ("node names made unique: 7 unnamed",), id="no names"),
        pytest.param("duplicate_names", ("node names made unique: 2 repeated",), id="repeated"),
    ],
)
def test_notes_say_what_changed(name: str, notes: tuple[str, ...]) -> None:
    assert normalise(tinymodels.MODELS[name]())[1] == notes


def test_names_come_from_operator_and_output() -> None:
    model, _ = normalise(tinymodels.unnamed_nodes())
    assert [node.name for node in model.graph.node][:3] == [
        "Conv_conv1",
        "Relu_relu1",
        "Conv_conv2",
    ]


def test_repeated_names_get_a_number_that_is_free() -> None:
    proto = tinymodels.duplicate_names()
    proto.graph.node[1].name = "Conv_1"
    model, _ = normalise(proto)
    names = [node.name for node in model.graph.node]
    assert names[:4] == ["Conv", "Conv_1", "Conv_2", "Relu"]
    inputs = tinymodels.feeds(proto)
    expected = tinymodels.run(tinymodels.conv_relu(), inputs)["logits"]
    found = tinymodels.run(model, inputs)["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_shapes_are_inferred_anew() -> None:
    proto = tinymodels.conv_relu()
    stale = helper.make_tensor_value_info("gone", TensorProto.FLOAT, [1])
    proto.graph.value_info.append(stale)
    model, _ = normalise(proto)
    infos = {info.name for info in model.graph.value_info}
    assert infos == {"conv1", "relu1", "conv2", "relu2", "pooled", "flat"}


def test_a_constant_that_is_an_output_stays() -> None:
    net = tinymodels.Net()
    net.op("Relu", net.input("input"), out="output")
    net.op("Constant", out="version", value_int=3)
    model, notes = normalise(
        net.model({"output": tinymodels.PICTURE, "version": ((), tinymodels.INT64)})
    )
    assert notes == ()
    assert tinymodels.run(model)["version"] == 3


@pytest.mark.parametrize(
    ("attribute", "value", "expected"),
    [
        ("value_int", 3, np.int64(3)),
        ("value_ints", [1, 2], np.array([1, 2], np.int64)),
        ("value_float", 0.5, np.float32(0.5)),
        ("value_floats", [0.5, 2.0], np.array([0.5, 2.0], np.float32)),
        ("value_strings", [b"a", b"b"], np.array(["a", "b"], object)),
    ],
)
def test_every_kind_of_constant(attribute: str, value: object, expected: np.ndarray) -> None:
    net = tinymodels.Net()
    net.op("Constant", out="c", **{attribute: value})
    kind = helper.np_dtype_to_tensor_dtype(np.asarray(expected).dtype)
    net.op("Identity", net.op("Unsqueeze", "c", net.const("axis", [0], np.int64), out="u"), out="o")
    proto = net.model({"o": ((1, *np.shape(expected)), kind)})
    model, notes = normalise(proto)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}["c"]
    np.testing.assert_array_equal(stored, expected)
    assert notes == ("1 Constant nodes became initializers",)


def test_a_sparse_constant_stays_a_node() -> None:
    values = helper.make_tensor("v", TensorProto.FLOAT, [1], [2.0])
    where = helper.make_tensor("i", TensorProto.INT64, [1], [1])
    net = tinymodels.Net()
    net.op("Constant", out="c", sparse_value=helper.make_sparse_tensor(values, where, [3]))
    net.op("Add", net.input("input", ("N", 3)), "c", out="output")
    model, notes = normalise(net.model({"output": ("N", 3)}))
    assert notes == ()
    assert [node.op_type for node in model.graph.node] == ["Constant", "Add"]


def test_an_identity_read_inside_a_subgraph_is_replaced_there() -> None:
    proto = tinymodels.branches()
    graph = proto.graph
    graph.initializer.append(numpy_helper.from_array(np.ones((1, 16, 1, 1), np.float32), "ones"))
    graph.node.insert(0, helper.make_node("Identity", ["ones"], ["same"], name="same"))
    chosen = next(node for node in graph.node if node.op_type == "If")
    branch = next(a.g for a in chosen.attribute if a.name == "then_branch").node[0]
    branch.CopyFrom(helper.make_node("Mul", ["conv", "same"], ["yes_out"], name="yes_node"))
    inputs = tinymodels.feeds(proto)
    model, notes = normalise(proto)
    assert notes == ("1 Identity nodes became initializers",)
    expected, found = tinymodels.run(proto, inputs), tinymodels.run(model, inputs)
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-4, atol=1e-5)


def test_functions_are_inlined() -> None:
    body = [
        helper.make_node("Sigmoid", ["a"], ["s"]),
        helper.make_node("Mul", ["a", "s"], ["b"]),
    ]
    domain = "com.example"
    silu = helper.make_function(domain, "Silu", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    net = tinymodels.Net()
    x = net.conv(net.input("input"), "conv", 3, 64)  # its weights are above HEAVY_BYTES
    net.op("Silu", x, out="output", domain=domain)
    proto = net.model({"output": ("N", 64, 8, 8)})
    proto.functions.append(silu)
    proto.opset_import.append(helper.make_opsetid(domain, 1))
    model, notes = normalise(proto)
    assert notes[0] == "1 model-local functions inlined"
    assert [node.op_type for node in model.graph.node] == ["Conv", "Sigmoid", "Mul"]
    inputs = tinymodels.feeds(proto)
    expected, found = tinymodels.run(proto, inputs), tinymodels.run(model, inputs)
    np.testing.assert_allclose(found["output"], expected["output"], rtol=1e-4, atol=1e-5)


def test_batch_norm_of_opset_7_with_all_its_constants_as_inputs() -> None:
    net = tinymodels.Net(opset=7)
    x = net.conv(net.input("input"), "conv", 3, 16)
    parts = [
        net.const(n, np.full(16, v)) for n, v in zip("sbmv", (1.5, 0.5, 0.1, 2.0), strict=True)
    ]
    net.op("BatchNormalization", x, *parts, out="output")
    proto = net.model({"output": ("N", 16, 8, 8)})
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        info = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        proto.graph.input.append(info)
    model, notes = normalise(proto)
    assert notes == (
        "6 initializers were also inputs; now they are constants",
        "opset 7 upgraded to 13",
    )
    inputs = tinymodels.feeds(proto)
    expected, found = tinymodels.run(proto, inputs), tinymodels.run(model, inputs)
    np.testing.assert_allclose(found["output"], expected["output"], rtol=1e-4, atol=1e-5)


def test_the_long_name_of_the_default_domain_is_understood() -> None:
    proto = tinymodels.conv_relu()
    proto.opset_import[0].domain = "ai.onnx"
    for node in proto.graph.node:
        node.domain = "ai.onnx"
    model, _ = normalise(proto)
    assert model.opset_import[0].domain == ""
    assert {node.domain for node in model.graph.node} == {""}


def test_dimensions_below_1_are_free() -> None:
    proto = tinymodels.conv_relu()
    batch, _, height, width = proto.graph.input[0].type.tensor_type.shape.dim
    batch.dim_value, height.dim_value, width.dim_value = -1, 0, -1
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = -1
    model, notes = normalise(proto)
    assert notes == ("4 dimensions that were -1 or 0 are free",)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.WhichOneof("value") for dim in dims] == [None, "dim_value", None, None]
    assert not model.graph.output[0].type.tensor_type.shape.dim[0].WhichOneof("value")


def test_graphs_without_a_name_get_one() -> None:
    proto = tinymodels.branches()
    proto.graph.name = ""
    chosen = next(node for node in proto.graph.node if node.op_type == "If")
    for entry in chosen.attribute:
        entry.g.name = ""
    model, _ = normalise(proto)
    onnx.checker.check_model(model)
    assert model.graph.name


class CountedNames(Counter[str]):
    """Counts how often it is asked for a number."""

    asked = 0

    def __getitem__(self, key: str) -> int:
        type(self).asked += 1
        return super().__getitem__(key)


def test_repeated_names_cost_one_number_each(monkeypatch: pytest.MonkeyPatch) -> None:
    net, count = tinymodels.Net(), 3000
    x = net.input("input", ("N", 4))
    for k in range(count):
        x = net.op("Relu", x, out=f"r{k}", name="same")
    monkeypatch.setattr("trtune.precision.graph.normalise.Counter", CountedNames)
    model = net.model({x: ("N", 4)})
    assert name_nodes(model) == f"node names made unique: {count - 1} repeated"
    assert [node.name for node in model.graph.node][-1] == f"same_{count - 1}"
    assert CountedNames.asked <= 4 * count


def _edited(edit: str) -> onnx.ModelProto:
    proto = tinymodels.conv_relu()
    if edit == "opset 99":
        proto.opset_import[0].version = 99
    elif edit == "no opset":
        del proto.opset_import[:]
    elif edit == "cycle":
        proto.graph.node[0].input[0] = "relu2"
    elif edit == "unknown operator":
        proto.graph.node[1].op_type = "Rellu"
    elif edit == "missing tensor":
        proto.graph.node[1].input[0] = "nowhere"
    elif edit == "short weight":
        (weight,) = (t for t in proto.graph.initializer if t.name == "conv2_w")
        weight.raw_data = weight.raw_data[:-4]
    return proto


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("opset 99", r"uses opset 99; 1 to \d+ can be handled"),
        ("no opset", r"imports no default operator set"),
        ("cycle", r"the graph has a cycle \(see n_conv1, n_relu1, n_conv2\)"),
        ("unknown operator", r"not valid ONNX: .*Rellu"),
        ("missing tensor", r"not valid ONNX: .*nowhere"),
        ("short weight", r"not valid ONNX: .*conv2_w"),
    ],
)
def test_what_cannot_be_handled_is_said(edit: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        normalise(_edited(edit))
