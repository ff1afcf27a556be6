"""Operators between dequantized values and what multiplies them: which of them the compiler takes
codes through, so that the product is int8, and which not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import helper
from rtxparts import needs_rtx
from tinyqat import QatNet, assert_same_bits, imported
from tinyquant import outputs

from trtune.precision.backends.rtx.as_it_is import build_as_it_is
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.plan.placement import carries
from trtune.precision.quantized.against import against_builder
from trtune.precision.quantized.importing import insert_quantization, lint_model, load_quantized
from trtune.precision.runtime.api import Candidate

Put = Callable[[QatNet, str], str]


def op(kind: str, *constants: tuple[Any, type], **attributes: Any) -> Put:
    def put(net: QatNet, x: str) -> str:
        names = [net.const(f"c{k}", value, dtype) for k, (value, dtype) in enumerate(constants)]
        return net.op(kind, x, *names, out="between", **attributes)

    return put


def split(net: QatNet, x: str) -> str:
    net.nodes.append(helper.make_node("Split", [x], ["between", "rest"], name="n_split", axis=2))
    return "between"


def resize(net: QatNet, x: str) -> str:
    scales = net.const("factors", [1, 1, 2, 2])
    return net.op("Resize", x, "", scales, out="between", mode="nearest")


def network(put: Put) -> onnx.ModelProto:
    """Conv, pair, `put`, Conv."""
    net = QatNet()
    x = net.qconv(net.pair(net.input("input", (2, 3, 8, 8)), 0.03), "one", 3, 16)
    return net.head(net.qconv(put(net, net.pair(x, 0.03)), "two", 16, 16), 16)


PADS = ([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
CODES: dict[str, Put] = {
    "split": split,
    "slice": op("Slice", ([0], np.int64), ([8], np.int64), ([2], np.int64), ([2], np.int64)),
    "gather": op("Gather", ([1, 0, 3], np.int64), axis=2),
    "pad": op("Pad", PADS),
    "pad with a stored 0": op("Pad", PADS, (0.0, np.float32)),
    "reflected pad": op("Pad", PADS, mode="reflect"),
    "global max pool": op("GlobalMaxPool"),
    "largest": op("ReduceMax", axes=[2], keepdims=1),
    "sign": op("Neg"),
    "cast to what it is": op("Cast", to=onnx.TensorProto.FLOAT),
    "max pool": op("MaxPool", kernel_shape=[2, 2], strides=[2, 2]),
    "transpose": op("Transpose", perm=[0, 1, 3, 2]),
}
BEHIND: dict[str, Put] = {
    "resize": resize,
    "pad that no convolution reads": lambda net, x: net.op(
        "MaxPool", op("Pad", PADS)(net, x), out="largest", kernel_shape=[3, 3]
    ),
}
"""What the compiler computes in float, where the same pair behind gives the same bits."""
FLOATS: dict[str, Put] = {
    "pad with 1": op("Pad", PADS, (1.0, np.float32)),
    "average": op("AveragePool", kernel_shape=[2, 2]),
    "leaky": op("LeakyRelu"),
    "sum along": op("CumSum", (2, np.int64)),
    "sum of constants": op("Add", (0.5, np.float32)),
}
EVERY = {**CODES, **BEHIND, **FLOATS, "factor": op("Mul", (2.0, np.float32))}


@pytest.mark.parametrize("name", EVERY)
def test_what_reads_them_is_planned_int8_where_codes_pass(name: str) -> None:
    proto = network(EVERY[name])
    found = imported(proto)
    assert found.plan.is_int8("n_two") == (name in {*CODES, *BEHIND})
    again = insert_quantization(found.model, found.table, found.plan)
    feeds = tinymodels.feeds(found.model.proto, batch=2)
    misread = name == "pad that no convolution reads" and not has_one_result(proto, feeds)
    assert_same_bits(proto, again, feeds, levels=("none",) if misread else ("none", "all"))


def has_one_result(proto: onnx.ModelProto, feeds: Mapping[str, Any]) -> bool:
    """Whether onnxruntime computes the same with and without its optimizations: 1.23.0 makes a Pad
    with zeros the MaxPool's own, which pads with the least value."""
    plain, fast = (outputs(proto, feeds, optimize=level) for level in ("none", "all"))
    return all(np.allclose(plain[name], fast[name], atol=1e-4) for name in plain)


def test_the_pair_in_front_of_a_resize_goes_behind() -> None:
    found = imported(network(resize))
    assert "pair-before-resize" in {row.kind for row in found.findings}
    assert [read.tensor for read in found.plan.reads if read.node == "n_two"] == ["between/float"]


@needs_rtx
@pytest.mark.parametrize("name", EVERY)
def test_linter_and_compiler_agree(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(network(EVERY[name]), path)
    original, _ = load_quantized(path)
    built = build_as_it_is(original, tmp_path)
    precisions = {node: account.precision for node, account in built.accounts.items()}
    seen = against_builder(original, lint_model(path), refused=built.refused, precisions=precisions)
    assert seen.disagreements == ()
    assert precisions["n_two"] == ("int8" if name in {*CODES, "factor"} else "fp32")


@needs_rtx
@pytest.mark.parametrize("name", ["split", "pad with a stored 0", *BEHIND])
def test_the_import_is_built_in_int8(name: str, tmp_path: Path) -> None:
    found = imported(network(EVERY[name]))
    backend = RtxBackend(compute_capabilities=["8.9"])
    info = backend.build(Candidate(found.model, found.plan, found.table), tmp_path)
    assert info.precisions["n_two"] == "int8"
    assert info.not_honoured == ()


def test_without_the_graph_no_pad_with_zeros_is_known() -> None:
    node = helper.make_node("Pad", ["x", "pads"], ["y"])
    assert not carries(node, 0)
    assert carries(helper.make_node("Pad", ["x", "pads"], ["y"], mode="edge"), 0)
