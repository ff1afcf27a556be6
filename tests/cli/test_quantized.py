"""The commands for Q/DQ models and caches of earlier TensorRT."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
import tinyqat
from rtxparts import needs_rtx
from typer.testing import CliRunner, Result

from trtune.calibrate.cache import Cache, dump_cache, load_table, read_cache
from trtune.cli.commands import app
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.quantized.migrate import migrate_files
from trtune.precision.runtime.api import Candidate


def invoke(*args: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: one quantized model of each kind, and a float one."""
    monkeypatch.chdir(tmp_path)
    onnx.save(tinyqat.torch_residual(), "qat.onnx")
    onnx.save(tinyqat.tensorflow_block(), "uint8.onnx")
    onnx.save(tinymodels.conv_relu(), "float.onnx")
    return tmp_path


class TestLint:
    def test_a_model_as_tensorrt_wants_it_passes(self, folder: Path) -> None:
        assert "0 in the way" in invoke("qdq", "lint", "qat.onnx").stdout

    def test_one_that_it_cannot_take_ends_with_1(self, folder: Path) -> None:
        found = json.loads(invoke("qdq", "lint", "uint8.onnx", "--json", status=1).stdout)
        assert any(row["severity"] == "error" and not row["repaired"] for row in found)
        assert {"node", "kind", "found", "tensorrt", "remedy"} <= found[0].keys()
        allowed = invoke("qdq", "lint", "uint8.onnx", "--allow-requantize", "-v")
        assert "0 in the way" in allowed.stdout

    @needs_rtx
    def test_the_compiler_stands_beside_the_linter(self, folder: Path) -> None:
        shown = invoke("qdq", "lint", "qat.onnx", "--build").stdout
        assert "TensorRT-RTX 8.9 on the file as it stands" in shown
        assert "linter and compiler agree" in shown
        value = json.loads(
            invoke("qdq", "lint", "uint8.onnx", "--build", "--json", status=1).stdout
        )
        assert "zero point" in value["build"]["refused"]
        assert value["build"]["disagreements"] == []
        assert value["findings"]

    def test_a_gpu_that_is_not_known_is_refused(self, folder: Path) -> None:
        refused = ("qdq", "lint", "qat.onnx", "--build", "--compute-capability", "9.0")
        assert "9.0 is not supported" in invoke(*refused, status=2).stderr


class TestStripAndInsert:
    def test_what_is_taken_out_is_put_in_again_with_the_same_outputs(self, folder: Path) -> None:
        shown = invoke("qdq", "strip", "qat.onnx", "-o", "fp32.onnx", "--cache", "q.cache").stdout
        assert shown.startswith("wrote fp32.onnx and q.cache")
        ops = {node.op_type for node in onnx.load("fp32.onnx").graph.node}
        assert "QuantizeLinear" not in ops
        assert load_table(Path("q.cache")).reads
        invoke("qdq", "insert", "fp32.onnx", "q.cache", "-o", "again.onnx")
        tinyqat.assert_same_bits(
            onnx.load("qat.onnx"),
            onnx.load("again.onnx"),
            tinymodels.feeds(onnx.load("qat.onnx"), batch=4),
        )

    def test_files_are_overwritten_only_by_force(self, folder: Path) -> None:
        strip = ("qdq", "strip", "qat.onnx", "-o", "float.onnx", "--cache", "q.cache")
        before = Path("float.onnx").read_bytes()
        result = invoke(*strip, status=2)
        assert "float.onnx is there already; --force overwrites it" in result.stderr
        assert Path("float.onnx").read_bytes() == before
        assert not Path("q.cache").exists()
        invoke(*strip, "--force")
        assert Path("float.onnx").read_bytes() != before

    def test_a_float_model_has_nothing_to_take_out(self, folder: Path) -> None:
        result = invoke("qdq", "strip", "float.onnx", "-o", "a", "--cache", "b", status=2)
        assert "holds no QuantizeLinear or DequantizeLinear" in result.stderr
        assert not Path("a").exists()


class TestCache:
    def test_the_scales_of_a_model_for_tensorrt_10(self, folder: Path) -> None:
        invoke("qdq", "cache", "qat.onnx", "--to", "10.14.1", "-o", "ten.cache")
        cache = read_cache(Path("ten.cache"))
        assert cache.version == (10, 14, 1)
        assert cache.scales["input"] > 0

    def test_a_version_that_is_none(self, folder: Path) -> None:
        result = invoke("qdq", "cache", "qat.onnx", "--to", "ten", "-o", "x", status=2)
        assert "'ten' is not a TensorRT version" in result.stderr


class TestMigrate:
    @pytest.fixture
    def cache(self, folder: Path) -> Path:
        """A cache of the float model, with one tensor that it does not have."""
        names = ["input", "conv1", "relu1", "conv2", "relu2", "logits"]
        lines = [f"{name}: {np.float32(0.01 * (i + 1)).view(np.uint32):x}"
                 for i, name in enumerate([*names, "relu3"])]  # fmt: skip
        (folder / "old.cache").write_text("\n".join(["TRT-8601-EntropyCalibration2", *lines, ""]))
        return folder / "old.cache"

    def test_it_writes_model_plan_cache_and_report(self, cache: Path) -> None:
        Path("layers.txt").write_text("--layerPrecisions=n_conv2:fp32")
        result = invoke(
            "migrate", "--cache", cache, "--model", "float.onnx", "--pins", "layers.txt", "-o", "m"
        )
        model = onnx.load("m/model.onnx")
        onnx.checker.check_model(model, full_check=True)
        pairs = [n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"]
        assert "input" in pairs
        assert "relu1" not in pairs  # what n_conv2 reads
        plan = json.loads(Path("m/plan.json").read_text())
        assert plan["nodes"]["n_conv2"]["precision"] == "fp32"
        report = Path("m/report.md").read_text()
        assert "'relu3'" in report
        assert "pin n_conv2:fp32" in report
        assert read_cache(Path("m/calibration.cache")).scales["input"] == np.float32(0.01)
        assert "relu3" in result.stdout

    @pytest.mark.slow
    @pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
    def test_what_it_carries_over_is_built_as_planned(self, cache: Path, tmp_path: Path) -> None:
        pins = tmp_path / "layers.txt"
        pins.write_text("--layerPrecisions=n_conv2:fp32")
        model, found = migrate_files(Path("float.onnx"), cache, pins)
        backend = RtxBackend(compute_capabilities=("8.9",))
        info = backend.build(Candidate(model, found.plan, found.table), tmp_path / "engine")
        nodes = found.plan.compute_nodes
        assert {n: info.precisions[n] for n in nodes} == {n: found.plan.precision(n) for n in nodes}
        assert info.not_honoured == ()

    def test_as_json(self, cache: Path) -> None:
        result = invoke("migrate", "--cache", cache, "--model", "float.onnx", "--json")
        value = json.loads(result.stdout)
        assert [entry["name"] for entry in value["unmatched"]] == ["relu3"]
        assert Path(value["model"]).is_file()

    def test_a_header_without_scales_and_a_wrong_fallback(self, cache: Path) -> None:
        cache.write_text("TRT-8601-EntropyCalibration2\n")
        migrate = ("migrate", "--cache", cache, "--model", "float.onnx")
        assert "a header and no scale" in invoke(*migrate, status=2).stderr
        wrong = invoke(*migrate, "--fallback", "int4", status=2).stderr
        assert "--fallback 'int4' is none of fp32, fp16, bf16" in wrong
        assert not Path("migrated").exists()

    def test_a_cache_of_another_model(self, cache: Path) -> None:
        other = read_cache(cache)
        renamed = type(other)(other.header, {f"x/{k}": v for k, v in other.scales.items()})
        cache.write_text(dump_cache(renamed))
        result = invoke("migrate", "--cache", cache, "--model", "float.onnx", status=2)
        assert "old.cache" in result.stderr
        assert not Path("migrated").exists()


class TestInspect:
    def test_a_quantized_model_comes_with_what_the_linter_finds(self, folder: Path) -> None:
        value = json.loads(invoke("inspect", "uint8.onnx", "--json").stdout)
        assert any("zero point" in problem for problem in value["problems"])

    def test_an_engine_is_told_by_what_stands_beside_it(self, folder: Path) -> None:
        Path("engine.plan").write_bytes(b"plan")
        result = invoke("inspect", "engine.plan", status=2)
        assert "a plan tells nothing by itself" in result.stderr
        Path("engine.json").write_text(json.dumps({
            "backend": "tensorrt_rtx", "file": "engine.plan", "size_bytes": 4,
            "precisions": {"a": "int8", "b": "fp32"}, "not_honoured": ["b: planned int8"],
            "seconds": 1.5, "versions": {"tensorrt_rtx": "1.7"}, "log": "", "reason": "no GPU",
            "details": {"compute_capabilities": ["8.9"], "command": "tensorrt_rtx ..."},
        }))  # fmt: skip
        shown = invoke("inspect", "engine.plan", "-v").stdout
        for text in ("tensorrt_rtx 1.7", "8.9", "INT8 (1), FP32 (1)", "planned int8", "no GPU"):
            assert text in shown
        assert json.loads(invoke("inspect", "engine.plan", "--json").stdout)["size_bytes"] == 4
        Path("other.plan").write_bytes(b"plan")
        assert "not about other.plan" in invoke("inspect", "other.plan", status=2).stderr


def test_init_takes_a_quantized_model_as_it_is(folder: Path) -> None:
    invoke("init", "qat.onnx")
    assert "default: qat" in Path("qat.yaml").read_text()
    invoke("init", "float.onnx")
    assert "default: int8" in Path("float.yaml").read_text()


class TestForeignCaches:
    """A cache of another export, of which TensorRT says nothing."""

    @pytest.fixture
    def foreign(self, folder: Path) -> Path:
        """Names that coincide for half of the tensors, shifted by one layer for the rest."""
        scales = {"input": 0.01, "relu1": 0.02, "relu_a": 0.03, "relu_b": 0.04, "conv_c": 0.05}
        path = folder / "foreign.cache"
        path.write_text(dump_cache(Cache("TRT-8601-EntropyCalibration2", scales)))
        onnx.save(tinymodels.residual(), "other.onnx")
        return path

    def test_it_is_refused_with_the_reasons_unless_forced(self, foreign: Path) -> None:
        own = [n for n in onnx.load("other.onnx").graph.node if n.op_type == "Conv"]
        assert len(own) > 2
        command = ("migrate", "--cache", foreign, "--model", "other.onnx", "-o", "m")
        told = " ".join(invoke(*command, status=2).stderr.split())
        assert "--force" in told
        assert "tensors that need a scale have no entry" in told
        assert not Path("m").exists()
        value = json.loads(invoke(*command, "--force", "--json").stdout)
        assert value["belongs"] is False
        assert value["against"]
        assert Path("m/model.onnx").is_file()

    def test_the_right_one_is_taken(self, folder: Path) -> None:
        names = ("input", "conv1", "relu1", "conv2", "relu2", "pooled", "flat", "logits")
        scales = {name: 0.01 + 0.001 * k for k, name in enumerate(names)}
        (folder / "own.cache").write_text(dump_cache(Cache("TRT-8601-MinMaxCalibration", scales)))
        result = invoke("migrate", "--cache", "own.cache", "--model", "float.onnx", "--json")
        assert json.loads(result.stdout)["belongs"] is True
        assert "the cache belongs to this model: 3 of 3" in Path("migrated/report.md").read_text()

    def test_a_tensor_without_a_range_is_missing_and_its_node_named(self, folder: Path) -> None:
        names = ("input", "conv1", "conv2", "relu2", "pooled", "flat", "logits")
        text = dump_cache(Cache("TRT-8601-EntropyCalibration2", dict.fromkeys(names, 0.02)))
        (folder / "own.cache").write_text(text + "relu1: 7f800000\n")
        result = invoke("migrate", "--cache", "own.cache", "--model", "float.onnx", "--json")
        (missing,) = json.loads(result.stdout)["missing"]
        assert missing["name"] == "relu1"
        assert "no range in the cache" in missing["why"]
        assert "n_conv2" in missing["why"]
