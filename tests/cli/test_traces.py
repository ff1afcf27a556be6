"""Plans, layers and logs on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx
import pytest
import tinymodels
from typer.testing import CliRunner, Result

from trtune.cli.commands import app


def invoke(*args: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    half = {"Name": "x", "Dimensions": [1, 8, 4, 4], "Format/Datatype": "Row major linear FP16"}
    layers = [
        {"Name": "n_conv1 + n_relu1", "LayerType": "CaskConvolution", "Inputs": [half],
         "Outputs": [half]},
        {"Name": "n_conv2", "LayerType": "CaskConvolution", "Inputs": [half], "Outputs": [half]},
    ]  # fmt: skip
    Path("layers.json").write_text(json.dumps({"Layers": layers, "Bindings": []}))
    times = [{"count": 2}, {"name": "n_conv1 + n_relu1", "averageMs": 0.5, "timeMs": 1.0},
             {"name": "n_conv2", "averageMs": 0.25, "timeMs": 0.5}]  # fmt: skip
    Path("profile.json").write_text(json.dumps(times))
    onnx.save(tinymodels.conv_relu(), "model.onnx")


def test_layers_and_times_of_the_nodes_of_a_model() -> None:
    given = ("--layers", "layers.json", "--profile", "profile.json")
    value = json.loads(invoke("inspect", "model.onnx", *given, "--json").stdout)
    assert value["nodes"]["n_conv1"] == {"precision": "fp16", "milliseconds": 0.5}
    assert value["nodes"]["n_relu1"] == {"precision": "fp16", "milliseconds": None}
    assert value["nodes"]["n_conv2"] == {"precision": "fp16", "milliseconds": 0.25}
    assert "0.75 ms together" in invoke("inspect", "model.onnx", *given).stdout


def test_layers_alone() -> None:
    value = json.loads(invoke("inspect", "layers.json", "--json").stdout)
    assert value["weighted_layers"] == {"fp16": 2}
    assert "2 layers" in invoke("inspect", "layers.json").stdout


def test_layers_as_a_page() -> None:
    given = ("inspect", "layers.json", "--profile", "profile.json", "--html", "page.html")
    assert "wrote page.html" in invoke(*given).stdout
    page = Path("page.html").read_text("utf-8")
    assert page.index("n_conv1 + n_relu1") < page.index('<td class="t">n_conv2</td>')
    assert "0.75" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "is there already" in invoke(*given, status=2).stderr
    invoke(*given, "--force")
    bare = ("inspect", "model.onnx", "--html", "other.html")
    assert "holds no layers" in invoke(*bare, status=2).stderr


def test_a_plan_without_tensorrt() -> None:
    Path("engine.plan").write_bytes(bytes.fromhex("66747274" + "00" * 20 + "0a0e0100") + b"i8i8_i8")
    value = json.loads(invoke("inspect", "engine.plan", "--json").stdout)
    assert (value["maker"], value["version"]) == ("TensorRT", "10.14.1.0")
    assert value["int8_kernels"]
    Path("engine.plan").write_bytes(b"plan")
    assert "nothing by itself" in invoke("inspect", "engine.plan", status=2).stderr


def test_a_log_is_explained() -> None:
    Path("build.log").write_text(
        "[WARNING] Missing scale and zero-point for tensor conv2, expect fall back to non-int8\n"
    )
    value = json.loads(invoke("explain", "build.log", "--model", "model.onnx", "--json").stdout)
    (event,) = value["events"]
    assert (event["key"], event["nodes"]) == ("missing scale", ["n_conv2"])
    assert "conv2 has no scale" in " ".join(invoke("explain", "build.log").stdout.split())
    Path("other.log").write_text("hello\n")
    assert "no line of it is known" in invoke("explain", "other.log").stdout
    assert "cannot read the log" in invoke("explain", "none.log", status=2).stderr


@pytest.mark.parametrize("given", [["--layers", "none.json"], ["--layers", "profile.json"]])
def test_files_that_are_no_layers(given: list[str]) -> None:
    invoke("inspect", "model.onnx", *given, status=2)
