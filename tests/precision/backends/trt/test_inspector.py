"""What every node runs in, from the inspector's JSON of both versions; never a guess."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trtune.precision.backends.trt.inspector import (
    EngineLayer,
    data_type,
    node_precisions,
    parse_layers,
)

INT8_FORMAT = "Thirty-two wide channel vectorized row major Int8 format."


def old(text: str) -> dict[str, Any]:
    return {"Name": "t", "Dimensions": [1, 3, 8, 8], "Format/Datatype": text}


def layer(name: str, *inputs: Any, **more: Any) -> dict[str, Any]:
    return {"Name": name, "LayerType": "CaskConvolution", "Inputs": list(inputs), **more}


def parsed(*layers: Any, nodes: str = "a b c") -> tuple[EngineLayer, ...]:
    return parse_layers(json.dumps({"Layers": list(layers), "Bindings": []}), nodes.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (INT8_FORMAT, "int8"),
        ("Row major linear FP32", "fp32"),
        ("Row major linear FP32 format (kLINEAR)", "fp32"),
        ("Channel major FP16 format where channel % 4 == 0", "fp16"),
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
        ("Row major linear BF16 format", "bf16"),
        ("FP8", "fp8"),
        ("Int32", "int32"),
        ("Row major INT64", "int64"),
        ("Bool", "bool"),
        ("N/A due to dynamic shapes", None),
        ("some new word", None),
        ("", None),
    ],
)
def test_a_description_names_a_type(text: str, expected: str | None) -> None:
    assert data_type(text) == expected


@pytest.mark.parametrize(
    ("entry", "precision"),
    [
        pytest.param(layer("a", old(INT8_FORMAT), old("Half")), "int8", id="its first input"),
        pytest.param(layer("a", old("Bool"), old("Float")), "fp32", id="a mask does not count"),
        pytest.param(
            layer("a", {"Name": "t", "Format": "Row major linear", "Datatype": "Int8"}), "int8",
            id="11.x: type apart from format",
        ),
        pytest.param(layer("a", {"Name": "t", "DataType": "Half"}), "fp16", id="11.x: DataType"),
        pytest.param(
            layer("a", {"Name": "t", "Format": "Row major linear FP32"}), "unknown",
            id="a format alone is no type",
        ),
        pytest.param(
            layer("a", old("N/A due to dynamic shapes"), old("Half")), "unknown",
            id="shapes were not given",
        ),
        pytest.param(layer("a", Outputs=[old("Half")]), "fp16", id="no input: its output"),
        pytest.param(layer("a", "t"), "unknown", id="inputs as names alone"),
        pytest.param({"Name": "a"}, "unknown", id="no inputs at all"),
        pytest.param({"Name": "a", "Inputs": "t"}, "unknown", id="inputs in another form"),
        pytest.param("a", "unknown", id="built with names alone"),
    ],
)  # fmt: skip
def test_the_precision_of_a_layer(entry: Any, precision: str) -> None:
    (found,) = parsed(entry)
    assert (found.nodes, found.precision) == (("a",), precision)


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        pytest.param("x", "[ONNX Layer: a]", ("a",), id="metadata"),
        pytest.param("x", "[ONNX Layer: a][ONNX Layer: b]", ("a", "b"), id="two of them"),
        pytest.param("x", "[ONNX Layer: a]\x1e[ONNX Layer: b]", ("a", "b"), id="record separator"),
        pytest.param(
            "x", "p [ONNX Layer: a]\x1fq [ONNX Layer: b]", ("a", "b"), id="unit separator"
        ),
        pytest.param("x", "[ONNX Layer: n[0][1]]", ("n[0][1]",), id="brackets in the name"),
        pytest.param("x", "[ONNX Layer: other]", (), id="a node that nobody asked for"),
        pytest.param("a", "[ONNX Layer: other]", (), id="metadata counts before the name"),
        pytest.param("a + b", "", ("a", "b"), id="fused"),
        pytest.param("a + PWN(b)", "", ("a", "b"), id="fused pointwise"),
        pytest.param("a + PWN(PWN(b), PWN(c))", "", ("a", "b", "c"), id="nested pointwise"),
        pytest.param("{ForeignNode[a...b]}", "", ("a", "b"), id="first and last of a region"),
        pytest.param(
            "{ForeignNode[a + b...c]}", "", ("a", "b", "c"), id="a region that begins fused"
        ),
        pytest.param("Reformatting CopyNode for Input Tensor 0 to a", "", (), id="a reformat"),
    ],
)
def test_the_nodes_of_a_layer(name: str, metadata: str, expected: tuple[str, ...]) -> None:
    (found,) = parsed(layer(name, Metadata=metadata), nodes="a b c n[0][1]")
    assert found.nodes == expected


def made(kind: str, precision: str, *nodes: str) -> EngineLayer:
    return EngineLayer("x", kind, precision, nodes)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        pytest.param([made("CaskConvolution", "int8", "a", "b")], "int8", id="fused: all of them"),
        pytest.param(
            [made("Reformat", "fp32", "a"), made("CaskConvolution", "int8", "a")], "int8",
            id="moving data does not count beside computing",
        ),
        pytest.param([made("kgen", "fp16", "a")], "fp16", id="but alone it does"),
        pytest.param(
            [made("CaskConvolution", "int8", "a"), made("CaskConvolution", "fp32", "a")], "unknown",
            id="layers that disagree",
        ),
        pytest.param([made("CaskConvolution", "int8", "b")], "unknown", id="a node in no layer"),
        pytest.param([], "unknown", id="no layers"),
    ],
)  # fmt: skip
def test_the_precision_of_a_node(layers: list[EngineLayer], expected: str) -> None:
    assert node_precisions(layers, ["a"]) == {"a": expected}


@pytest.mark.parametrize(
    "text", ["", "not json", "[1, 2]", '{"Layers": 3}', '{"layers": []}', "null"]
)
def test_what_is_not_understood_gives_no_layers(text: str) -> None:
    assert parse_layers(text, ["a"]) == ()
    assert node_precisions(parse_layers(text, ["a"]), ["a"]) == {"a": "unknown"}
