"""Every export of a real run, read back as the tool reads it."""

from __future__ import annotations

import configparser
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tinymodels
from tinyproject import config_of, write_project

from trtune.calibrate.cache import read_cache
from trtune.calibrate.provider_table import read_provider_table
from trtune.configs.errors import InputError
from trtune.configs.sources import Preprocess
from trtune.export.bundle import Bundle, unreserved
from trtune.export.deepstream import normalisation
from trtune.export.targets import TARGETS, export_run
from trtune.precision.traces.pin_text import commands_in, shell_commands
from trtune.run.naming import run_folder
from trtune.run.pipeline import run

PIN = "conv:1"
"""A name that lists of layers cannot hold."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that pins a convolution with a colon in its name."""
    proto = tinymodels.conv_relu()
    next(n for n in proto.graph.node if n.op_type == "Conv").name = PIN
    folder = write_project(tmp_path_factory.mktemp("export"), proto)
    config = config_of(folder, f"precision.pin={{'{PIN}': fp32}}", "data.evaluation.classes=[a, b]")
    run(config, out=folder / "runs")
    return run_folder(config, folder / "runs")


def outputs(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, feeds)
    return found


def test_trtexec_gets_both_models_the_cache_and_the_pins(finished: Path, tmp_path: Path) -> None:
    export = export_run(finished, "trtexec", tmp_path)
    assert all((tmp_path / name).is_file() for name in export.files)
    fp32 = onnx.load(tmp_path / "model_fp32.onnx")
    names = {node.name for node in fp32.graph.node}
    script = (tmp_path / "build-trt10-cache.sh").read_text()
    [command] = commands_in(script)
    pins = dict(entry.rsplit(":", 1) for entry in command.entries)
    assert pins["conv_1"] == "fp32"
    assert set(pins) <= names
    assert {"--int8", "--calib=calibration.cache", "--precisionConstraints=obey"} <= set(
        command.words
    )
    tensors = {t for node in fp32.graph.node for t in (*node.input, *node.output)}
    tensors |= {f"{weight.name}_output" for weight in fp32.graph.initializer}
    assert set(read_cache(tmp_path / "calibration.cache").scales) <= tensors
    ten = (tmp_path / "build-trt10.sh").read_text()
    eleven = (tmp_path / "build-trt11.sh").read_text()
    assert "--stronglyTyped" in ten
    assert "--stronglyTyped" not in eleven  # nothing else there, and no option for it


def test_models_are_those_of_the_run_and_say_where_they_come_from(
    finished: Path, tmp_path: Path
) -> None:
    export_run(finished, "trtexec", tmp_path)
    exported = onnx.load(tmp_path / "model_qdq.onnx")
    said = {entry.key: entry.value for entry in exported.metadata_props}
    assert said["trtune.method"] == "max"
    assert said["trtune.target"] == "metric: sqnr_db, min: 5.0"
    assert finished.name.endswith(said["trtune.key"][:10])
    feeds = tinymodels.feeds(exported)
    built = outputs(finished / "onnxruntime-emulate" / "model.onnx", feeds)
    for one, other in zip(outputs(tmp_path / "model_qdq.onnx", feeds), built, strict=True):
        np.testing.assert_array_equal(one, other)
    original = outputs(finished.parents[1] / "net.onnx", feeds)
    for one, other in zip(outputs(tmp_path / "model_fp32.onnx", feeds), original, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_deepstream_reads_its_configuration(finished: Path, tmp_path: Path) -> None:
    export_run(finished, "deepstream", tmp_path)
    parser = configparser.ConfigParser(delimiters="=", interpolation=None)
    parser.read(tmp_path / "config_infer.txt")
    section = parser["property"]
    assert section["network-mode"] == "1"
    for key in ("onnx-file", "int8-calib-file", "labelfile-path"):
        assert (tmp_path / section[key]).is_file()
    pins = [entry.split(":") for entry in section["layer-device-precision"].split(";")]
    assert ["conv_1", "fp32", "gpu"] in pins
    assert all(len(pin) == 3 for pin in pins)
    assert (tmp_path / "labels.txt").read_text().split() == ["a", "b"]


@pytest.mark.parametrize(
    ("section", "factor", "offsets", "notes"),
    [
        ({}, 1 / 255, [0, 0, 0], 0),
        ({"scale": 1, "mean": [127.5], "std": [127.5]}, 1 / 127.5, [127.5] * 3, 0),
        ({"mean": [0.5, 0.25, 0], "std": [0.5]}, 2 / 255, [127.5, 63.75, 0], 0),
        ({"std": [0.2, 0.25, 0.25]}, (5 + 4 + 4) / 3 / 255, [0, 0, 0], 1),
        ({"channels": "GRAY", "mean": [0.1], "std": [0.5]}, 2 / 255, [25.5], 0),
    ],
)
def test_what_nvinfer_does_to_a_pixel(
    section: dict[str, object], factor: float, offsets: list[float], notes: int
) -> None:
    found = normalisation(Preprocess.model_validate(section))
    assert found[0] == pytest.approx(factor)
    assert found[1] == pytest.approx(offsets)
    assert len(found[2]) == notes


@pytest.mark.parametrize("model", ["conv_relu", "fixed_batch", "two_outputs", "int64_input"])
def test_triton_reads_its_configuration(model: str, tmp_path: Path) -> None:
    pb = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs trtune[exports]")
    text_format = pytest.importorskip("google.protobuf.text_format")
    folder = write_project(tmp_path / "project", getattr(tinymodels, model)())
    config = config_of(folder)
    run(config, out=folder / "runs")
    export = export_run(run_folder(config, folder / "runs"), "triton", tmp_path / "out")
    found = text_format.Parse((tmp_path / "out" / export.files[0]).read_text(), pb.ModelConfig())
    proto = onnx.load(folder / "net.onnx")
    batched = model != "fixed_batch"
    assert found.platform == "tensorrt_plan"
    assert found.HasField("dynamic_batching") == batched
    assert found.max_batch_size == (32 if batched else 0)
    assert found.parameters["trtune.method"].string_value == "max"
    for described, infos in ((found.input, proto.graph.input), (found.output, proto.graph.output)):
        assert [entry.name for entry in described] == [info.name for info in infos]
        for entry, info in zip(described, infos, strict=True):
            dims = [d.dim_value or -1 for d in info.type.tensor_type.shape.dim]
            assert list(entry.dims) == dims[1 if batched else 0 :]
    kinds = {"int64_input": pb.TYPE_INT64}
    assert found.input[0].data_type == kinds.get(model, pb.TYPE_FP32)
    assert (tmp_path / "out" / "model_repository" / found.name / "1").is_dir()


def test_onnxruntime_reads_its_table(finished: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization.CalTableFlatBuffers.TrtTable import TrtTable

    export_run(finished, "ort", tmp_path)
    data = (tmp_path / "calibration.flatbuffers").read_bytes()
    table = TrtTable.GetRootAsTrtTable(data, 0)
    entries = (table.Dict(index) for index in range(table.DictLength()))
    ranges = {entry.Key().decode(): float(entry.Value()) for entry in entries}
    cache = Bundle.of(finished).cache
    assert cache is not None
    assert ranges == pytest.approx({name: s * 127 for name, s in cache.scales.items()})
    assert read_provider_table(data) == ranges
    options = json.loads((tmp_path / "providers.json").read_text())
    assert options["tensorrt-table"]["options"]["trt_int8_calibration_table_name"] == (
        "calibration.flatbuffers"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "load.py", "tensorrt-qdq"], capture_output=True, text=True
    )
    if "TensorrtExecutionProvider" not in ort.get_available_providers():
        assert "this onnxruntime has no TensorrtExecutionProvider" in done.stderr


def test_polygraphy_runs_its_script(finished: Path, tmp_path: Path) -> None:
    export_run(finished, "polygraphy", tmp_path)
    done = subprocess.run(
        [sys.executable, tmp_path / "compare.py"], capture_output=True, text=True, check=True
    )
    [line] = [line for line in done.stdout.splitlines() if "SQNR" in line]
    with np.load(tmp_path / "inputs.npz") as arrays:
        feeds = dict(arrays)
    reference, found = (
        outputs(tmp_path / f"model_{kind}.onnx", feeds)[0].astype(np.float64)
        for kind in ("fp32", "qdq")
    )
    expected = 10 * np.log10((reference**2).sum() / ((found - reference) ** 2).sum())
    assert float(line.split()[-2]) == pytest.approx(expected, abs=0.1)


def test_every_export_has_a_readme_with_its_commands(finished: Path, tmp_path: Path) -> None:
    for target in TARGETS:
        export = export_run(finished, target, tmp_path / target)
        text = (tmp_path / target / "README.md").read_text()
        for step in export.steps:
            assert step.command in text
            assert shell_commands(step.command)


def test_what_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trtexec"):
        export_run(finished, "trtexe", tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="--force"):
        export_run(finished, "ort", tmp_path / "full")
    with pytest.raises(InputError, match="no such file"):
        export_run(tmp_path, "ort", tmp_path / "b")


@pytest.mark.parametrize("target", ["trtexec", "polygraphy", "deepstream", "ort"])
def test_fp8_is_in_the_qdq_model_alone(tmp_path: Path, target: str) -> None:
    folder = write_project(tmp_path / "project")
    config = config_of(folder, "precision.pin={n_conv2: fp8}")
    run(config, out=folder / "runs")
    export = export_run(run_folder(config, folder / "runs"), target, tmp_path / "out")
    assert any("1 layers are planned in FP8" in note for note in export.notes)
    texts = [p for p in (tmp_path / "out").iterdir() if p.suffix in (".sh", ".py", ".txt", ".json")]
    written = [path.read_text() for path in texts]
    assert not any(":fp8" in text for text in written)
    models = [onnx.load(path) for path in (tmp_path / "out").glob("model_qdq.onnx")]
    for model in models:
        assert any(t.data_type == onnx.TensorProto.FLOAT8E4M3FN for t in model.graph.initializer)


def test_a_model_that_changed_since_is_refused(tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    config = config_of(folder)
    run(config, out=folder / "runs")
    onnx.save(tinymodels.residual(), folder / "net.onnx")
    with pytest.raises(InputError, match="not the model of this run any more"):
        export_run(run_folder(config, folder / "runs"), "trtexec", tmp_path / "out")


def test_names_stay_apart() -> None:
    assert unreserved(["a:b", "a,b", "c"], {"a_b"}) == {"a:b": "a_b_", "a,b": "a_b__"}
