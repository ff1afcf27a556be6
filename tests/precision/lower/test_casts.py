"""Strong typing: which type every tensor gets, and that Casts stand at borders only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from realdata import shared_case
from tinymodels import Net
from tinyquant import initializer, maker, op_counts, outputs

from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import ModelError, TrtuneError
from trtune.precision.graph.file import load_model, tensor_spec
from trtune.precision.graph.view import GraphView, Model, model_from_proto
from trtune.precision.lower.casts import insert_casts, needed_opset, raise_opset
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.lower.half_on_cpu import in_float32
from trtune.precision.plan.half_rules import keep_fp32, tensors_for_ranges
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.session import make_session

WORDS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def typed(proto: onnx.ModelProto, types: Mapping[str, str]) -> onnx.ModelProto:
    """The typed model, valid and with the inputs and outputs that it had."""
    model = model_from_proto(proto).proto
    before = model.SerializeToString(deterministic=True)
    found = insert_casts(model, types)
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(found, full_check=True)
    for part in ("input", "output"):
        mine, its = (getattr(m.graph, part) for m in (found, model))
        assert [tensor_spec(info) for info in mine] == [tensor_spec(info) for info in its]
    return found


def types_in(proto: onnx.ModelProto) -> dict[str, str]:
    """Tensor -> type by strict inference, constants included."""
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    del bare.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True).graph
    infos = (*graph.value_info, *graph.input, *graph.output)
    found = {info.name: info.type.tensor_type.elem_type for info in infos}
    found.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    stated = {info.name: info.type.tensor_type.elem_type for info in proto.graph.value_info}
    assert stated.items() <= found.items()
    return {name: TensorProto.DataType.Name(kind).lower() for name, kind in found.items()}


def casts_of(proto: onnx.ModelProto) -> list[tuple[str, str, str]]:
    """(input, output, type) of every Cast."""
    return [
        (n.input[0], n.output[0], TensorProto.DataType.Name(n.attribute[0].i).lower())
        for n in proto.graph.node
        if n.op_type == "Cast"
    ]


def line(*ops: str) -> onnx.ModelProto:
    """x -> the named operators, one after the other, on rows of 4."""
    net = Net()
    x = net.input("x", ("N", 4))
    for index, op in enumerate(ops):
        out = f"t{index}" if index < len(ops) - 1 else "y"
        if op == "MatMul":
            x = net.op(op, x, net.weight(f"w{index}", 4, 4), out=out, name=f"n{index}")
        else:
            x = net.op(op, x, out=out, name=f"n{index}")
    return net.model({"y": ("N", 4)})


# Borders


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        pytest.param({}, [], id="all float32"),
        pytest.param(
            {"n0": "fp16", "n1": "fp16", "n2": "fp16"},
            [("x", "x/float16", "float16"), ("y/float16", "y", "float")],
            id="all half: at the outside only",
        ),
        pytest.param(
            {"n1": "fp16"},
            [("t0", "t0/float16", "float16"), ("t1", "t1/float", "float")],
            id="one half node",
        ),
        pytest.param(
            {"n0": "fp16", "n2": "fp16"},
            [
                ("x", "x/float16", "float16"),
                ("t0", "t0/float", "float"),
                ("t1", "t1/float16", "float16"),
                ("y/float16", "y", "float"),
            ],
            id="an island of float32",
        ),
    ],
)
def test_casts_stand_at_the_borders(
    types: dict[str, str], expected: list[tuple[str, str, str]]
) -> None:
    found = typed(line("Relu", "MatMul", "Tanh"), types)
    named = [(s, t.replace("float32", "float"), k) for s, t, k in casts_of(found)]
    assert named == expected


def test_several_readers_share_a_cast() -> None:
    net = Net()
    x = net.op("Tanh", net.input("x", ("N", 4)), out="t")
    a, b = net.op("Relu", x, out="a"), net.op("Abs", x, out="b")
    net.op("Add", net.op("Mul", a, b, out="m"), x, out="y")
    found = typed(net.model({"y": ("N", 4)}), {"n_a": "fp16", "n_b": "fp16", "n_y": "fp16"})
    assert [c for c in casts_of(found) if c[0] == "t"] == [("t", "t/float16", "float16")]
    assert list(maker(found, "m").input) == ["a/float32", "b/float32"]
    assert list(maker(found, "y/float16").input) == ["m/float16", "t/float16"]


def test_an_output_that_is_read_further_on_keeps_its_name_and_type() -> None:
    proto = tinymodels.two_outputs()
    found = typed(proto, {node.name: "fp16" for node in proto.graph.node})
    assert maker(found, "features").op_type == "Cast"
    assert maker(found, "features").input[0] == "features/float16"
    assert maker(found, "pooled").input[0] == "features/float16"


def test_the_body_of_an_if_reads_float32_under_the_old_names() -> None:
    proto = tinymodels.branches()
    found = typed(
        proto, {n.name: "fp16" for n in proto.graph.node if n.op_type in ("Conv", "Relu", "Gemm")}
    )
    assert maker(found, "conv").op_type == maker(found, "relu").op_type == "Cast"
    assert maker(found, "relu/float16").input[0] == "conv/float16"
    feeds = tinymodels.feeds(proto)
    np.testing.assert_allclose(
        outputs(in_float32(found), feeds)["logits"], outputs(proto, feeds)["logits"], atol=3e-3
    )


def test_two_half_types_beside_each_other() -> None:
    model = raise_opset(model_from_proto(line("Relu", "MatMul", "Tanh")), 22)
    found = typed(model.proto, {"n0": "fp16", "n1": "bf16", "n2": "fp16"})
    kinds = types_in(found)
    assert [kinds[t] for t in ("t0", "t1", "y/float16")] == ["float16", "bfloat16", "float16"]
    assert len(casts_of(found)) == 4


# Constants


def test_shared_constants_are_converted_for_those_who_read_them_in_half() -> None:
    proto = tinymodels.shared_weight()
    found = typed(proto, {"n_conv1": "fp16", "n_relu1": "fp16"})
    assert list(maker(found, "conv1").input)[1:] == ["conv1_w/float16", "conv1_b/float16"]
    assert list(maker(found, "conv2").input)[1:] == ["conv1_w", "conv1_b"]
    half = numpy_helper.to_array(initializer(found, "conv1_w/float16"))
    assert half.dtype == np.float16
    exact = numpy_helper.to_array(initializer(proto, "conv1_w"))
    np.testing.assert_array_equal(half, exact.astype(np.float16))


def test_a_constant_that_nobody_reads_in_float32_is_gone() -> None:
    found = typed(tinymodels.conv_relu(), {"n_conv1": "fp16"})
    assert {"conv1_w", "conv1_b"}.isdisjoint(t.name for t in found.graph.initializer)


def test_a_constant_beyond_the_range_is_not_clamped() -> None:
    net = Net()
    net.op("MatMul", net.input("x", ("N", 2)), net.const("w", [[1.0], [-7e4]]), out="y")
    words = "constant 'w' reaches 70000, and float16 ends at 65504: the nodes that read it have to"
    with pytest.raises(ModelError, match=words):
        typed(net.model({"y": ("N", 1)}), {"n_y": "fp16"})


def test_an_infinite_constant_stays_infinite() -> None:
    net = Net()
    net.op("Max", net.input("x", ("N", 2)), net.const("least", -np.inf), out="y")
    found = typed(net.model({"y": ("N", 2)}), {"n_y": "fp16"})
    assert np.isneginf(numpy_helper.to_array(initializer(found, "least/float16")))


def test_a_name_that_is_taken_gets_a_number() -> None:
    net = Net()
    x = net.op("Relu", net.input("x", ("N", 4)), out="x/float16")
    net.op("Tanh", x, out="y", name="x/Cast")
    found = typed(net.model({"y": ("N", 4)}), {"n_x/float16": "fp16"})
    assert casts_of(found) == [
        ("x", "x/float16_2", "float16"),
        ("x/float16", "x/float16/float32", "float"),
    ]
    assert found.graph.node[0].name == "x/Cast_2"


def test_names_inside_a_body_are_taken_too() -> None:
    proto = tinymodels.branches()
    (chosen,) = (node for node in proto.graph.node if node.op_type == "If")
    body = chosen.attribute[0].g
    body.node[0].output[0] = body.output[0].name = "relu/float16"
    found = typed(proto, {"n_conv": "fp16", "n_relu": "fp16"})
    assert maker(found, "relu/float16_2").op_type == "Relu"


# Operators of their own kind


def test_resize_reads_its_scales_as_they_are() -> None:
    proto = tinymodels.resize()
    view = GraphView.of(model_from_proto(proto))
    found = typed(proto, {n.name: "fp16" for n in view.nodes if n.name not in view.shape_nodes})
    kinds = types_in(found)
    assert [kinds[t] for t in ("up", "big", "scales", "edge")] == ["float16"] * 2 + ["float"] * 2
    assert len(casts_of(found)) == 3  # one of them the model's own
    assert kinds[maker(found, "shape").input[0]] == "float16"  # a shape is that of any type


def test_a_cast_of_the_model_changes_what_it_gives() -> None:
    net = Net()
    x = net.op("Cast", net.input("ids", ("N", 4), TensorProto.INT64), out="x", to=TensorProto.FLOAT)
    net.op("MatMul", x, net.weight("w", 4, 2), out="y")
    found = typed(net.model({"y": ("N", 2)}), {"n_x": "fp16", "n_y": "fp16"})
    assert casts_of(found) == [("ids", "x", "float16"), ("y/float16", "y", "float")]


def test_a_cast_to_integers_reads_what_there_is() -> None:
    net = Net()
    x = net.op("Relu", net.input("x", ("N", 4)), out="r")
    net.op("Cast", x, out="y", to=TensorProto.INT32)
    found = typed(net.model({"y": (("N", 4), TensorProto.INT32)}), {"n_r": "fp16"})
    assert casts_of(found) == [("x", "x/float16", "float16"), ("r", "y", "int32")]


@pytest.mark.parametrize("value", [2.5, None])
def test_a_constant_of_a_computed_shape(value: float | None) -> None:
    net = Net()
    x = net.input("x", ("N", 4))
    given_value = {} if value is None else {"value": numpy_helper.from_array(np.float32([value]))}
    c = net.op("ConstantOfShape", net.op("Shape", x, out="s"), out="c", **given_value)
    net.op("Add", x, c, out="y")
    proto = net.model({"y": ("N", 4)})
    found = typed(proto, {"n_c": "fp16", "n_y": "fp16"})
    assert types_in(found)["c"] == "float16"
    feeds = tinymodels.feeds(proto)
    np.testing.assert_allclose(
        outputs(in_float32(found), feeds)["y"], feeds["x"] + (value or 0), atol=2e-3
    )


def test_comparisons_read_float32() -> None:
    net = Net()
    x = net.op("Relu", net.input("x", ("N", 4)), out="r")
    net.op("Greater", x, net.const("c", 0.1), out="y")
    found = typed(net.model({"y": (("N", 4), TensorProto.BOOL)}), {"n_r": "fp16"})
    assert list(maker(found, "y").input) == ["r/float32", "c"]


def test_a_node_that_cannot_take_its_type_is_named() -> None:
    net = Net()
    net.op("GridSample", net.input("x"), net.input("grid", ("N", 8, 8, 2)), out="y")
    words = "node 'n_y' is planned in fp16, but it computes positions; make the plan again"
    with pytest.raises(TrtuneError, match=words):
        typed(net.model({"y": ("N", 3, 8, 8)}), {"n_y": "fp16"})


# Q/DQ


def pair(opset: int = 19) -> onnx.ModelProto:
    """x -> a -> Q -> DQ -> two readers b and c -> y."""
    net = Net(opset=opset)
    a = net.op("Tanh", net.input("x", ("N", 4)), out="a")
    scale, zero = net.const("s", 0.0078125), net.const("z", 0, np.int8)
    q = net.op("QuantizeLinear", a, scale, zero, out="q")
    d = net.op("DequantizeLinear", q, scale, zero, out="d")
    b, c = net.op("Relu", d, out="b"), net.op("Neg", d, out="c")
    net.op("Add", b, c, out="y")
    return net.model({"y": ("N", 4)})


@pytest.mark.parametrize(
    ("types", "q", "d"),
    [
        pytest.param({}, "float", ["float"], id="float32"),
        pytest.param({"n_a": "fp16"}, "float16", ["float"], id="half before"),
        pytest.param(
            {"n_b": "fp16", "n_c": "fp16", "n_y": "fp16"}, "float", ["float16"], id="half behind"
        ),
        pytest.param({"n_b": "fp16"}, "float", ["float", "float16"], id="one reader of two"),
    ],
)
def test_pairs_have_scales_of_the_types_around_them(
    types: dict[str, str], q: str, d: list[str]
) -> None:
    found = typed(pair(), types)
    kinds = types_in(found)
    (quantize,) = (n for n in found.graph.node if n.op_type == "QuantizeLinear")
    back = [n for n in found.graph.node if n.op_type == "DequantizeLinear"]
    assert [kinds[name] for name in quantize.input[:2]] == [q, q]
    assert [kinds[n.input[1]] for n in back] == d == [kinds[n.output[0]] for n in back]
    assert {n.input[0] for n in back} == {"q"}
    around = {"a", "d", *(n.output[0] for n in back)}
    assert not [cast for cast in casts_of(found) if cast[0] in around]


def test_pairs_before_opset_19_stay_float32_behind_casts() -> None:
    found = typed(pair(17), {"n_a": "fp16", "n_b": "fp16"})
    kinds = types_in(found)
    assert kinds[maker(found, "q").input[0]] == "float"
    assert maker(found, maker(found, "b").input[0]).op_type == "Cast"


def test_a_dequantization_that_is_read_in_half_alone_before_opset_19() -> None:
    found = typed(pair(17), {"n_b": "fp16", "n_c": "fp16", "n_y": "fp16"})
    assert maker(found, "d").op_type == "DequantizeLinear"
    assert [c for c in casts_of(found) if c[0] == "d"] == [("d", "d/float16", "float16")]


def test_a_shape_needs_no_dequantization_of_its_own() -> None:
    proto = pair()
    proto.graph.node.append(helper.make_node("Shape", ["d"], ["shape"], name="n_shape"))
    info = helper.make_tensor_value_info("shape", TensorProto.INT64, (2,))
    proto.graph.output.append(info)
    found = typed(proto, {"n_b": "fp16", "n_c": "fp16", "n_y": "fp16"})
    assert op_counts(found)["DequantizeLinear"] == 1


def test_the_output_type_of_a_dequantization_in_opset_23() -> None:
    proto = pair(23)
    proto.ir_version = 11
    for made in proto.graph.node:
        if made.op_type == "DequantizeLinear":
            made.attribute.append(helper.make_attribute("output_dtype", TensorProto.FLOAT))
    found = typed(proto, {"n_b": "fp16", "n_c": "fp16", "n_y": "fp16"})
    assert types_in(found)["d"] == "float16"


# The opset


@pytest.mark.parametrize(
    ("name", "options", "opset"),
    [
        ("conv_relu", {"default": "fp32"}, 17),
        ("conv_relu", {"default": "int8"}, 17),
        ("conv_relu", {"default": "fp16"}, 17),
        ("conv_relu", {"default": "int8", "fallback": "fp16"}, 19),
        ("conv_relu", {"default": "fp16", "pins": {"n_conv2": "int8"}}, 19),
        ("conv_relu", {"default": "bf16"}, 22),
        ("conv_relu", {"default": "fp16", "pins": {"n_conv2": "bf16"}}, 22),
        ("quantized", {"default": "fp16"}, 19),
        ("opset11", {"default": "fp16"}, 13),
    ],
)
def test_the_opset_that_a_plan_needs(name: str, options: dict[str, str], opset: int) -> None:
    view = GraphView.of(model_from_proto(tinymodels.MODELS[name]()))
    assert needed_opset(view, make_plan(view, **options)) == opset  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [n for n in tinymodels.MODELS if n != "half_weights"])
@pytest.mark.parametrize("opset", [19, 22])
def test_raising_the_opset_keeps_nodes_and_numbers(name: str, opset: int) -> None:
    model = model_from_proto(tinymodels.MODELS[name]())
    raised = raise_opset(model, opset)
    onnx.checker.check_model(raised.proto, full_check=True)
    assert raised.opset == opset
    assert (raised.inputs, raised.outputs) == (model.inputs, model.outputs)
    assert raised.sha256 == model.sha256
    names = [node.name for node in model.proto.graph.node]
    assert [n.name for n in raised.proto.graph.node if n.name in names] == names
    feeds = tinymodels.feeds(model.proto)
    expected = tinymodels.run(model.proto, feeds)
    for tensor, found in tinymodels.run(raised.proto, feeds).items():
        np.testing.assert_allclose(found, expected[tensor], rtol=1e-4, atol=1e-5)


def test_a_model_of_that_opset_is_left_alone() -> None:
    model = model_from_proto(tinymodels.conv_relu())
    assert raise_opset(model, 17) is model
    assert raise_opset(model, 13) is model


def test_an_opset_that_cannot_be_raised() -> None:
    net = Net(opset=13)
    statistics = [net.const(name, np.ones(3)) for name in ("scale", "bias", "mean", "var")]
    outputs = ["y", "mean_out", "var_out", "saved_mean", "saved_var"]  # gone since opset 14
    inputs = [net.input("x"), *statistics]
    net.nodes.append(helper.make_node("BatchNormalization", inputs, outputs, name="n_y"))
    proto = net.model({"y": tinymodels.PICTURE})
    model = Model(proto, Path("m.onnx"), "", (), (), 13)
    words = r"m.onnx uses opset 13, and these precisions need 22; converting it failed: .*"
    with pytest.raises(ModelError, match=words + "Export it again with `opset_version=22`"):
        raise_opset(model, 22)


# Any graph

OPS = ["Relu", "Tanh", "Add", "Max", "MatMul", "Cast", "Pair", "Identity"]
Step = tuple[str, int, int, str, bool]
steps = st.lists(
    st.tuples(
        st.sampled_from(OPS), st.integers(0, 9), st.integers(0, 9),
        st.sampled_from(["fp32", "fp16", "bf16"]), st.booleans(),
    ),
    min_size=1, max_size=9,
)  # fmt: skip


def graph_of(described: list[Step]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A model of opset 22 and the types of its nodes; each step reads one or two tensors."""
    net = Net(opset=22)
    made, types, ends = [net.input("x", (4, 4))], {}, {}
    scale, zero = net.const("s", 0.0078125), net.const("z", 0, np.int8)
    weight = net.weight("w", 4, 4)
    for index, (op, first, second, kind, is_output) in enumerate(described):
        a, b = made[first % len(made)], made[second % len(made)]
        out = f"t{index}"
        if op == "Pair":
            q = net.op("QuantizeLinear", a, scale, zero, out=f"q{index}")
            net.op("DequantizeLinear", q, scale, zero, out=out)
        elif op == "Cast":
            net.op("Cast", a, out=out, to=TensorProto.FLOAT)
        elif op in ("Add", "Max"):
            net.op(op, a, b, out=out)
        else:
            net.op(op, a, *([weight] if op == "MatMul" else []), out=out)
        types[f"n_{out}"] = kind
        made.append(out)
        if is_output or index == len(described) - 1:
            ends[out] = (4, 4)
    proto = net.model(ends)
    proto.ir_version = 10
    return proto, types


@settings(max_examples=150, deadline=None)
@given(steps)
def test_no_cast_is_superfluous(described: list[Step]) -> None:
    proto, types = graph_of(described)
    source = model_from_proto(proto).proto
    found = typed(proto, types)
    kinds = types_in(found)
    own = {n.name for n in source.graph.node if n.op_type == "Cast"}
    mine = [n for n in found.graph.node if n.op_type == "Cast" and n.name not in own]
    made_by_cast = {n.output[0] for n in mine}
    read = Counter(name for node in found.graph.node for name in node.input)
    ends = {info.name for info in found.graph.output}
    for cast in mine:
        assert kinds[cast.input[0]] != kinds[cast.output[0]]
        assert cast.input[0] not in made_by_cast  # no chains
        assert read[cast.output[0]] or cast.output[0] in ends
    assert len({(n.input[0], n.attribute[0].i) for n in mine}) == len(mine)
    for node in found.graph.node:
        if node.name in types and node.op_type not in ("Cast", "DequantizeLinear"):
            wanted = "float" if types[node.name] == "fp32" else WORDS[types[node.name]]
            assert kinds[node.output[0]] == wanted
    assert len(mine) == _needed(source, types)


def _needed(proto: onnx.ModelProto, types: Mapping[str, str]) -> int:
    """How many Casts there have to be: one for each type in which a tensor is read and not made."""
    native, wanted = {"x": "fp32"}, Counter[tuple[str, str]]()
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            native[node.output[0]] = ""  # as many as are wanted
            continue
        kind = types.get(node.name, "fp32")
        for name in node.input:
            if node.op_type not in ("Cast", "QuantizeLinear"):
                wanted[name, kind] += 1
        if node.op_type != "QuantizeLinear":
            native[node.output[0]] = kind
    for info in proto.graph.output:
        wanted[info.name, "fp32"] += 1
    return sum(1 for name, kind in wanted if native.get(name) not in ("", None, kind))


def test_quantized_models_keep_their_integers() -> None:
    proto = tinymodels.quantized()
    model = raise_opset(model_from_proto(proto), 19)
    found = insert_casts(model.proto, {n.name: "fp16" for n in model.proto.graph.node})
    kinds = types_in(found)
    assert [kinds[t] for t in ("x_q", "w_q", "x_dq", "w")] == ["int8", "int8", "float16", "float16"]
    assert op_counts(found)["Cast"] == 1  # at the output: the input goes into its Q in float32


# Normalisation as elementary nodes, which onnxruntime puts together again


def normalised(form: str, square: str, opset: int) -> onnx.ModelProto:
    """A product, a normalisation of its result, and another product."""
    net = Net(opset=opset)

    def mean(tensor: str, out: str) -> str:
        if opset < 18:
            return net.op("ReduceMean", tensor, out=out, axes=[-1])
        return net.op("ReduceMean", tensor, net.const(f"{out}_axes", [-1], np.int64), out=out)

    x = net.op("MatMul", net.input("input", ("N", 6, 16)), net.weight("w", 16, 16), out="x")
    if form == "group":
        x = net.op("Reshape", x, net.const("rows", [0, 24, 4], np.int64), out="grouped")
    if form == "cast":
        x = net.op("Cast", x, out="as_float", to=TensorProto.FLOAT)
    centred = x if form == "rms" else net.op("Sub", x, mean(x, "mean"), out="centred")
    if square == "Mul":
        power = net.op("Mul", centred, centred, out="power")
    else:
        power = net.op("Pow", centred, net.const("two", 2.0), out="power")
    shifted = net.op("Add", mean(power, "variance"), net.const("eps", 1e-5), out="shifted")
    y = net.op("Div", centred, net.op("Sqrt", shifted, out="root"), out="y")
    if form == "group":
        y = net.op("Reshape", y, net.const("back", [0, 6, 16], np.int64), out="shaped")
    y = net.op("Mul", y, net.weight("gamma", 16), out="scaled")
    if form != "rms":
        y = net.op("Add", y, net.weight("beta", 16), out="moved")
    net.op("MatMul", y, net.weight("v", 16, 5), out="output")
    return net.model({"output": ("N", 6, 5)})


def in_halves(model: Model, half: str) -> tuple[PrecisionPlan, onnx.ModelProto]:
    view = GraphView.of(model)
    plan = make_plan(view, default=half)
    plan = keep_fp32(view, plan, dict.fromkeys(tensors_for_ranges(view), 3.0))
    return plan, lower_emulate(model, plan, CalibrationTable({}))


def error_in_onnxruntime(
    model: Model, lowered: onnx.ModelProto, feeds: Mapping[str, np.ndarray]
) -> float:
    names = [spec.name for spec in model.outputs]
    exact, found = (
        make_session(proto).run(names, dict(feeds))[0] for proto in (model.proto, lowered)
    )
    return float(np.abs(exact - found).max() / np.abs(exact).max())


@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("form", ["layer", "rms", "group", "cast"])
@pytest.mark.parametrize(
    ("square", "opset"), [("Pow", 11), ("Mul", 13), ("Pow", 17), ("Mul", 18), ("Pow", 20)]
)
def test_a_normalisation_can_be_loaded(form: str, square: str, opset: int, half: str) -> None:
    proto = normalised(form, square, opset)
    model = model_from_proto(proto)
    plan, lowered = in_halves(model, half)
    inside = {n for n in plan.nodes if n not in ("n_x", "n_output", "n_grouped", "n_as_float")}
    assert {plan.precision(name) for name in inside} == {"fp32"}
    assert {plan.precision(name) for name in ("n_x", "n_output")} == {half}
    feeds = tinymodels.feeds(proto, batch=3)
    assert error_in_onnxruntime(model, in_float32(lowered), feeds) < 0.05
    if half == "fp16":
        assert error_in_onnxruntime(model, lowered, feeds) < 0.01


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_the_case_of_a_normalisation_that_could_not_be_loaded(half: str) -> None:
    model = load_model(shared_case("layernorm_apart.onnx"))
    feeds = dict(np.load(shared_case("layernorm_apart.npz")))
    plan, lowered = in_halves(model, half)
    assert plan.precision("aadd") == plan.precision("cadd") == "fp32"
    assert plan.precision("fc1") == half
    assert error_in_onnxruntime(model, in_float32(lowered), feeds) < 0.05
