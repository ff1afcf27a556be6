"""The linter's expectation of each product beside a build, and what is a contradiction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tinyqat

from trtune.precision.graph.view import model_from_proto
from trtune.precision.quantized.against import Agreement, Product, against_builder
from trtune.precision.quantized.importing import import_model, lint_model, load_quantized

BUILT = {"n_stem": "int8", "n_conv1": "int8", "n_conv2": "int8", "n_logits": "int8"}


def seen(proto: onnx.ModelProto, folder: Path, *, refused: str = "", **built: str) -> Agreement:
    path = folder / "m.onnx"
    onnx.save(proto, path)
    original, _ = load_quantized(path)
    precisions = {} if refused else {**BUILT, **built}
    return against_builder(original, lint_model(path), refused=refused, precisions=precisions)


def test_what_both_say_is_no_contradiction(tmp_path: Path) -> None:
    found = seen(tinyqat.torch_residual(), tmp_path)
    assert {p.node: p.expected for p in found.products} == dict.fromkeys(BUILT, "int8")
    assert found.disagreements == ()


def test_a_product_in_float_is_said(tmp_path: Path) -> None:
    found = seen(tinyqat.torch_residual(), tmp_path, n_conv2="fp32")
    assert found.disagreements == ("n_conv2: the linter expects int8, and it runs in fp32",)


def test_codes_without_a_zero_point_are_read_as_int8(tmp_path: Path) -> None:
    """The file means uint8: an error, and integer kernels in spite of it, in wrong values."""
    net = tinyqat.QatNet()
    x = net.pair(net.input("input"), 0.03, None)
    proto = net.head(net.qconv(x, "conv", 3, 16), 16)
    found = seen(proto, tmp_path, n_conv="int8", n_logits="fp32")
    assert "n_conv" in {p.node for p in found.products}
    assert found.disagreements == ()


def test_a_refusal_that_no_finding_expects_is_said(tmp_path: Path) -> None:
    found = seen(tinyqat.torch_residual(), tmp_path, refused="no.")
    assert found.disagreements == ("the compiler refuses the file, and no finding says so: no.",)


def test_a_refusal_that_findings_expect(tmp_path: Path) -> None:
    assert seen(tinyqat.tensorflow_block(), tmp_path, refused="shift").disagreements == ()
    (sentence,) = seen(tinyqat.tensorflow_block(), tmp_path).disagreements
    assert "and it built it" in sentence


@pytest.mark.parametrize(
    ("expected", "found", "agrees"),
    [
        ("int8", "int8", True), ("float", "fp16", True), ("int8", "fp32", False),
        ("float", "int8", False), ("", "int8", True), ("int8", "unknown", True), ("int8", "", True),
    ],
)  # fmt: skip
def test_agreement(expected: str, found: str, agrees: bool) -> None:
    assert Product("n", expected, found).agrees is agrees


def test_a_pair_that_a_repair_puts_behind_is_none_of_the_file() -> None:
    """uint8 around 0 is read as int8, wherever the repair of a ReLU puts the pair."""
    net = tinyqat.QatNet()
    x = net.pair(net.qconv(net.pair(net.input("input"), 0.03), "one", 3, 16), 0.03, 0, np.uint8)
    proto = net.head(net.qconv(net.op("Relu", x, out="relu"), "two", 16, 16), 16)
    rows = import_model(model_from_proto(proto), allow_requantize=True).findings
    built = {"n_one": "int8", "n_two": "fp32"}
    found = against_builder(model_from_proto(proto), rows, refused="", precisions=built)
    assert "uint8" in {row.kind for row in rows}
    assert found.expected_refusal == ()
