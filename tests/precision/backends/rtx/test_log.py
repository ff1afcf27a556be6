"""The compiler's list of kernels: recorded ones, and what is not as recorded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import tinymodels

from trtune.precision.backends.rtx.elementwise import ReadCodes
from trtune.precision.backends.rtx.log import (
    Account,
    Kernel,
    Operand,
    accounts,
    complaints,
    read_kernels,
    where,
)
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import make_plan

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> str:
    return (RECORDED / f"rtx-1.7.1.116-{name}.log").read_text("utf-8")


def kernels_of(name: str) -> tuple[Kernel, ...]:
    found = read_kernels(recorded(name))
    assert found is not None
    return found


def test_every_kernel_of_a_recorded_log_is_read() -> None:
    found = kernels_of("concat")
    kinds = Counter(kernel.kind for kernel in found)
    assert (kinds["correlation"], kinds["gemm"], kinds["maxpool"]) == (4, 1, 1)
    assert len(found) == recorded("concat").count(", LayerType: ")
    conv = next(kernel for kernel in found if "n_squeeze" in kernel.nodes and kernel.kind != "kgen")
    assert conv.nodes == ("n_squeeze", "input/DequantizeLinear", "squeeze_w/DequantizeLinear")
    assert [operand.dtype for operand in conv.inputs] == ["Int8"]
    assert conv.inputs[0].dims == (-1, 4, 8, 8)
    assert conv.constants[0].dims == (16, 4, 3, 3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param(
            "concat",
            {"n_squeeze": "int8", "n_left": "fp32", "n_right": "int8", "n_max": "int8",
             "n_mix": "int8", "n_logits": "int8", "n_pooled": "fp32", "nobody": "unknown"},
            id="a pinned conv is float, the others int8, a max pool on int8 too",
        ),
        pytest.param(
            "attention",
            {"n_qkv": "fp32", "n_proj": "int8", "n_scores": "fp32", "n_ln": "fp32"},
            id="int8 data cast and multiplied with float weights is float",
        ),
    ],
)  # fmt: skip
def test_what_nodes_run_in(name: str, expected: dict[str, str]) -> None:
    found = accounts(kernels_of(name), expected, compute=expected.keys() - {"n_pooled", "n_ln"})
    assert {node: account.precision for node, account in found.items()} == expected


def test_a_product_taken_apart_says_which_kernel_and_on_what() -> None:
    found = accounts(kernels_of("attention"), ["n_qkv"], compute={"n_qkv"})["n_qkv"]
    assert where(found) == "kernel __myl_CastMulFc_myl0_3 (runtime_fusion) on Int8 and Float"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("[I] Engine generation completed in 0.1 seconds.\n", id="no list"),
        pytest.param("[V] Layers:\n\nI/O Tensors:\n", id="an empty list"),
        pytest.param("[V] Layers:\nconv1 (Int8) -> conv2 (Int8)\n\n", id="other lines"),
        pytest.param(recorded("concat").replace("LayerType:", "Kind:"), id="a key renamed"),
        pytest.param(recorded("concat").replace("Datatype: Int8,", "Type: Int8,"), id="a type key"),
        pytest.param(recorded("concat").replace("[ONNX Layer: ", "[Node: "), id="the metadata"),
    ],
)
def test_an_unknown_format_is_not_read(text: str) -> None:
    assert read_kernels(text) is None
    assert accounts(None, ["n_mix"], compute=()) == {"n_mix": Account("unknown")}


def test_the_last_list_counts() -> None:
    first = recorded("attention")
    assert read_kernels(first + recorded("concat")) == kernels_of("concat")


def test_a_word_of_the_compiler_behind_a_node_is_not_part_of_its_name() -> None:
    text = recorded("concat").replace("[ONNX Layer: n_right]", "[ONNX Layer: n_right]__gemm_from_a")
    assert read_kernels(text) == kernels_of("concat")


def operand(dtype: str, *dims: int) -> Operand:
    return Operand("t", dims, dtype)


INT8, FLOAT = operand("Int8", -1, 16, 8, 8), operand("Float", -1, 16, 8, 8)
W_INT8, W_FLOAT = operand("Int8", 16, 16, 3, 3), operand("Float", 16, 16, 3, 3)
SCALES, ALPHA = operand("Float", 1, 16, 1, 1), operand("Float", 1)


@pytest.mark.parametrize(
    ("kind", "inputs", "constants", "expected"),
    [
        pytest.param("correlation", [INT8], [W_INT8, SCALES], "int8", id="both factors int8"),
        pytest.param("correlation", [INT8, FLOAT], [W_INT8, SCALES], "int8", id="a float skip"),
        pytest.param("correlation", [INT8], [W_FLOAT, SCALES], "fp32", id="float weights"),
        pytest.param("correlation", [FLOAT], [W_INT8, SCALES], "fp32", id="float data"),
        pytest.param("gemm", [INT8, INT8], [ALPHA, ALPHA], "int8", id="both from inputs"),
        pytest.param("gemm", [INT8, FLOAT], [ALPHA, ALPHA], "fp32", id="the second is float"),
        pytest.param("gemm", [INT8], [], "unknown", id="where the weights are is not seen"),
        pytest.param("runtime_fusion", [INT8, W_INT8], [SCALES], "int8", id="scales do not count"),
        pytest.param("runtime_fusion", [INT8, W_FLOAT], [], "fp32", id="cast before multiplying"),
        pytest.param("maxpool", [INT8], [ALPHA], "int8", id="a move of int8"),
        pytest.param("correlation", [operand("Half", 1, 8)], [operand("Half", 8, 8)], "fp16",
                     id="half"),
        pytest.param("correlation", [operand("BFloat16", 1, 8)], [operand("BFloat16", 8, 8)],
                     "bf16", id="bfloat16"),
        pytest.param("correlation", [operand("Half", 1, 8)], [W_FLOAT], "unknown", id="two floats"),
        pytest.param("correlation", [operand("FP8", 1, 8)], [W_INT8], "unknown", id="other types"),
        pytest.param("signal", [], [], "unknown", id="no tensors"),
    ],
)  # fmt: skip
def test_precision_of_a_kernel(
    kind: str, inputs: list[Operand], constants: list[Operand], expected: str
) -> None:
    kernel = Kernel("k", kind, tuple(inputs), tuple(constants), (FLOAT,), ("n",))
    assert kernel.precision == expected


def test_a_node_of_several_kernels_runs_in_the_widest() -> None:
    kernels = [
        Kernel("a", "gemm", (INT8,), (W_INT8,), (), ("n",)),
        Kernel("b", "gemm", (FLOAT,), (W_FLOAT,), (), ("n",)),
        Kernel("c", "kgen", (FLOAT,), (), (FLOAT,), ("n",)),
    ]
    found = accounts(kernels, ["n"], compute={"n"})["n"]
    assert (found.precision, [kernel.name for kernel in found.kernels]) == ("fp32", ["a", "b"])


BOTH = ReadCodes("int8", frozenset({"left_dq", "right_dq"}))


@pytest.mark.parametrize(
    ("reads", "writes", "nodes", "expected"),
    [
        pytest.param([INT8, FLOAT], INT8, ("left_dq", "right_dq"), "int8", id="both codes"),
        pytest.param([FLOAT], INT8, ("left_dq", "right_dq"), "int8", id="its result is quantized"),
        pytest.param([FLOAT], FLOAT, ("left_dq", "right_dq", "conv"), "int8",
                     id="the tail of an int8 convolution"),
        pytest.param([FLOAT], FLOAT, ("left_dq", "right_dq", "float_conv"), "fp32",
                     id="the tail of a float one"),
        pytest.param([FLOAT, FLOAT], INT8, ("left_dq",), "fp32", id="one side came as floats"),
        pytest.param([FLOAT, FLOAT], FLOAT, (), "fp32", id="both sides came as floats"),
    ],
)  # fmt: skip
def test_a_quantized_sum_of_elements(
    reads: list[Operand], writes: Operand, nodes: tuple[str, ...], expected: str
) -> None:
    kernels = [
        Kernel("c", "correlation", (INT8,), (W_INT8,), (FLOAT,), ("conv",)),
        Kernel("f", "correlation", (FLOAT,), (W_FLOAT,), (FLOAT,), ("float_conv",)),
        Kernel("__myl_MulAdd", "kgen", tuple(reads), (SCALES,), (writes,), ("add", *nodes)),
    ]
    names, products = ["add", "conv", "float_conv"], {"conv", "float_conv"}
    found = accounts(kernels, names, compute=products, elementwise={"add": BOTH})
    assert found["add"].precision == expected


HALF = operand("Half", -1, 16, 8, 8)


@pytest.mark.parametrize(
    ("name", "reads", "writes", "product", "other"),
    [
        pytest.param("__myl_AddRelu_1", FLOAT, FLOAT, "fp32", "fp32", id="floats only"),
        pytest.param("__myl_MulMinMaxRounCast_1", FLOAT, INT8, "fp32", "fp32", id="quantizes"),
        pytest.param("__myl_CastMulAdd_1", INT8, FLOAT, "unknown", "fp32", id="dequantizes"),
        pytest.param("__myl_Conc_1", INT8, INT8, "unknown", "int8", id="moves int8"),
        pytest.param("__myl_AddRelu_1", HALF, HALF, "fp16", "fp16", id="halves only"),
        pytest.param("__myl_CastMeanSub_1", HALF, HALF, "unknown", "unknown",
                     id="a cast inside, to what is not said"),
        pytest.param("__myl_CastAdd_1", HALF, FLOAT, "unknown", "unknown", id="two float types"),
        pytest.param("_gemm_mha_v2_1", HALF, INT8, "fp16", "unknown", id="fused attention"),
    ],
)  # fmt: skip
def test_a_node_in_a_generated_kernel(
    name: str, reads: Operand, writes: Operand, product: str, other: str
) -> None:
    kernel = Kernel(name, "kgen", (reads,), (), (writes,), ("n",))
    assert accounts([kernel], ["n"], compute={"n"})["n"].precision == product
    assert accounts([kernel], ["n"], compute=())["n"].precision == other


def test_what_is_fused_with_an_int8_product_does_not_run_in_int8() -> None:
    kernel = Kernel("k", "correlation", (INT8,), (W_INT8,), (FLOAT,), ("conv", "relu"))
    found = accounts([kernel], ["conv", "relu"], compute={"conv"})
    assert {node: account.precision for node, account in found.items()} == {
        "conv": "int8",
        "relu": "unknown",
    }


def plan_of(**pins: str) -> PrecisionPlan:
    return make_plan(GraphView.of(model_from_proto(tinymodels.conv_relu())), pins=pins)


def every(precision: str, **others: str) -> dict[str, Account]:
    return {name: Account(others.get(name, precision)) for name in plan_of().nodes}


@pytest.mark.parametrize(
    ("pins", "found", "refused", "expected"),
    [
        pytest.param({}, every("int8"), {}, (), id="all as planned"),
        pytest.param(
            {}, every("int8", n_conv2="fp32"), {},
            ("n_conv2: planned int8, runs in fp32: no kernel names it",), id="int8 became float",
        ),
        pytest.param(
            {"n_conv1": "fp32"}, every("int8", n_relu1="fp32"), {},
            ("n_conv1: planned fp32, runs in int8: no kernel names it",), id="a pin was ignored",
        ),
        pytest.param(
            {"n_pooled": "fp32"}, every("int8", n_pooled="fp16"), {},
            ("n_pooled: planned fp32, runs in fp16: no kernel names it",),
            id="a pin of a node without weights was ignored",
        ),
        pytest.param(
            {}, every("int8", n_conv2="unknown"), {},
            ("n_conv2: planned int8, what it runs in is unknown: no kernel names it",),
            id="int8 that cannot be proved",
        ),
        pytest.param(
            {}, every("int8", n_conv1="fp32"), {"n_conv1": "no such kernel"},
            ("n_conv1: planned int8, built without Q/DQ and runs in fp32: TensorRT-RTX says "
             "'no such kernel'",),
            id="the compiler refused it",
        ),
    ],
)  # fmt: skip
def test_complaints(
    pins: dict[str, str],
    found: dict[str, Account],
    refused: dict[str, str],
    expected: tuple[str, ...],
) -> None:
    assert complaints(plan_of(**pins), found, refused) == expected


def test_an_unread_log_is_one_complaint() -> None:
    (sentence,) = complaints(plan_of(), every("unknown"), {}, readable=False)
    assert "precisions are unknown" in sentence


@pytest.mark.parametrize(
    ("name", "last", "found"),
    [
        ("_gemm_mha_v2_myl0_9", "Int8", "int8"),
        ("_gemm_mha_v2_myl0_9", "Half", "unknown"),
        ("__myl_MulMinMax_myl0_9", "Int8", "unknown"),
    ],
)
def test_fused_attention_multiplies_what_it_reads(name: str, last: str, found: str) -> None:
    kinds = ("Int8", "Int8", last)
    inputs = [Operand(f"x{k}", (-1, 16, 16), kind) for k, kind in enumerate(kinds)]
    scale = Operand("s", (1, 1, 1, 1), "Float")
    kernel = Kernel(name, "kgen", (*inputs, scale), (), (inputs[0],), ("qk", "av"))
    made = accounts([kernel], ["qk", "av"], compute=frozenset({"qk", "av"}))
    assert {node: account.precision for node, account in made.items()} == {"qk": found, "av": found}
