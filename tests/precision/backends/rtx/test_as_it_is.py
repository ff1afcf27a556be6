"""The file itself is what the compiler gets: only its nodes are named so that they can be found."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest
import tinyqat
from onnx import helper

from trtune.precision.backends.rtx.as_it_is import build_as_it_is, with_node_names
from trtune.precision.graph.view import model_from_proto
from trtune.precision.quantized.importing import load_quantized


def unnamed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto` with its constants as nodes, and no node named."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    constants = [
        helper.make_node("Constant", [], [t.name], value=t) for t in made.graph.initializer
    ]
    nodes = [*constants, *made.graph.node]
    del made.graph.initializer[:], made.graph.node[:]
    made.graph.node.extend(nodes)
    for node in made.graph.node:
        node.name = ""
    return made


def without_names(proto: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for node in made.graph.node:
        node.name = ""
    return made


def test_nothing_but_names_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(unnamed(tinyqat.torch_residual()), path)
    model, _ = load_quantized(path)
    found = with_node_names(model)
    assert without_names(found) == onnx.load(path)
    names = [node.name for node in found.graph.node]
    assert len(set(names)) == len(names)
    held = {node.output[0]: node.name for node in found.graph.node}
    assert all(held[node.output[0]] == node.name for node in model.proto.graph.node)


def test_a_model_in_memory_is_its_own_file() -> None:
    model = model_from_proto(tinyqat.torch_residual(), Path("never written.onnx"), fold="none")
    assert with_node_names(model) is model.proto


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)
def test_what_normal_form_would_hide_is_built(tmp_path: Path) -> None:
    """Constants as nodes are read by the compiler as they are, and the products found by name."""
    path = tmp_path / "m.onnx"
    onnx.save(unnamed(tinyqat.torch_residual()), path)
    model, _ = load_quantized(path)
    built = build_as_it_is(model, tmp_path)
    assert built.refused == ""
    products = [n.name for n in model.proto.graph.node if n.op_type in ("Conv", "Gemm")]
    assert {built.precision(name) for name in products} == {"int8"}
