"""Layers and times that trtexec exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import realdata
import tinyqat

from trtune.configs.errors import InputError
from trtune.precision.backends.trt.layer_table import quantized_nodes, read_profile, read_table
from trtune.precision.backends.trt.lints import EngineLint, lint_groups
from trtune.precision.graph.file import model_from_proto
from trtune.precision.graph.view import GraphView

INT8, HALF = "Thirty-two wide channel vectorized row major Int8 format", "Row major linear FP16"


def tensor(name: str, described: str, channels: int = 64) -> dict[str, object]:
    return {"Name": name, "Dimensions": [1, channels, 8, 8], "Format/Datatype": described}


def layer(name: str, kind: str, reads: str, writes: str, **more: object) -> dict[str, object]:
    ends = {"Inputs": [tensor("x", reads)], "Outputs": [tensor("y", writes)]}
    return {"Name": name, "LayerType": kind, **ends, **more}


def found(folder: Path, *layers: dict[str, object]) -> list[str]:
    path = folder / "layers.json"
    path.write_text(json.dumps({"Layers": layers, "Bindings": ["in", "out"]}))
    return [lint.kind for lint in read_table(path).lints]


@pytest.mark.parametrize(
    ("entry", "kinds"),
    [
        (layer("c", "CaskConvolution", INT8, INT8, TacticName="sm80_xmma_imma"), []),
        (layer("c", "CaskConvolution", INT8, INT8, TacticName="ampere_icudnn_int8x4_nn"),
         ["not on tensor cores"]),
        (layer("c", "CaskConvolution", INT8, HALF, TacticName="sm80_xmma"), ["INT8 in, float out"]),
        (layer("c", "CudaDepthwiseConvolution", INT8, INT8, TacticName="dw"), []),
        (layer("r", "Reformat", HALF, INT8, Origin="REFORMAT"), ["reformat"]),
        (layer("a/QuantizeLinear", "Reformat", HALF, INT8, Origin="QDQ"), ["Q/DQ left over"]),
        ({**layer("c", "CaskConvolution", INT8, INT8),
          "Inputs": [tensor("x", INT8, 12)]}, ["alignment"]),
    ],
)  # fmt: skip
def test_findings(tmp_path: Path, entry: dict[str, object], kinds: list[str]) -> None:
    assert found(tmp_path, entry) == kinds


def test_what_only_a_reshape_parts_from_an_output_may_be_float(tmp_path: Path) -> None:
    product = layer("fc", "CaskConvolution", INT8, HALF, TacticName="sm80_xmma")
    squeeze = {"LayerType": "NoOp", "Inputs": [tensor("y", HALF)], "Outputs": [tensor("out", HALF)]}
    assert found(tmp_path, product, {"Name": "squeeze", **squeeze}) == []


def test_findings_by_kind_the_costly_ones_first() -> None:
    def lint(kind: str, node: str, time: float | None) -> EngineLint:
        return EngineLint(kind, node, ("w.weight", node), "", f"mend {kind}", time)

    lints = [
        lint("a", "n1", 0.1),
        lint("b", "n2", 0.5),
        lint("a", "n3", 0.2),
        lint("c", "n4", None),
    ]
    groups = lint_groups(lints)
    assert [(g.kind, g.milliseconds, g.remedy) for g in groups] == [
        ("b", 0.5, "mend b"), ("a", pytest.approx(0.3), "mend a"), ("c", None, "mend c"),
    ]  # fmt: skip
    assert groups[1].places(1) == "n3 and 1 more"
    assert groups[1].places(2) == "n3, n1"


def test_a_planned_node_that_runs_in_float(tmp_path: Path) -> None:
    view = GraphView.of(model_from_proto(tinyqat.torch_residual()))
    planned = quantized_nodes(view)
    name = next(iter(planned))
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({"Layers": [layer(name, "CaskConvolution", HALF, HALF)]}))
    table = read_table(path, view=view)
    assert table.precisions[name] == "fp16"
    assert [lint.kind for lint in table.lints] == ["float though planned in INT8"]
    assert table.lints[0].nodes == (name,)


REAL = {
    "diffusion_8600": (385, {"fp32": 64}, {"reformat": 53}, 3.5919),
    "dynamic_na": (3, {"int8": 1}, {"reformat": 1, "alignment": 1}, None),
    "mobilenet_qat": (73, {"int8": 53}, {
        "not on tensor cores": 1, "alignment": 6, "INT8 in, float out": 16, "Q/DQ left over": 16,
        "reformat": 1}, 0.4704),
    "myelin_10x": (6, {"int8": 3}, {}, None),
    "resnet_fp16": (36, {"fp16": 21}, {"reformat": 2, "alignment": 1}, 1.0168),
    "resnet_qat": (37, {"int8": 21}, {
        "not on tensor cores": 1, "INT8 in, float out": 12, "alignment": 2, "reformat": 2,
        "Q/DQ left over": 9}, 1.0957),
    "resnet_qat_residual": (24, {"int8": 21}, {"alignment": 2}, 0.6728),
}  # fmt: skip
"""Real engines: layers, layers with weights by precision, findings, milliseconds together."""


@realdata.needs_data
@pytest.mark.parametrize("name", REAL)
def test_layers_of_real_engines(name: str) -> None:
    layers, weighted, lints, milliseconds = REAL[name]
    path = realdata.trace("layers", f"{name}.layers.json")
    profile = path.with_name(f"{name}.profile.json")
    table = read_table(path, profile if milliseconds else None)
    assert len(table.layers) == layers
    assert table.weighted() == weighted
    kinds = [lint.kind for lint in table.lints]
    assert {kind: kinds.count(kind) for kind in kinds} == lints
    if milliseconds:
        total = sum(table.node_times.values()) + table.elsewhere
        assert total == pytest.approx(milliseconds, rel=1e-3)
        assert total == pytest.approx(sum(table.times.values()), rel=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "holds no layers"), ("hello", "holds no layers"), ('{"Layers": []}', "no layers")],
)
def test_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / "l.json")
    with pytest.raises(InputError, match=r"no times|no JSON"):
        read_profile(tmp_path / "l.json")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "l.json")
