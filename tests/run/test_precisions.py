"""Whole runs with other precisions than INT8: half types, and models that are quantized already."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
import tinyqat
from tinyproject import BOTH, config_of, work_of, write_project

from trtune.calibrate.cache import load_table
from trtune.configs.errors import ModelError
from trtune.precision.plan.imported import ImportedPlan
from trtune.reports.record import RunRecord, Variant
from trtune.run.naming import run_folder
from trtune.run.pipeline import run


def ran(folder: Path, *overrides: str) -> RunRecord:
    return run(config_of(folder, *overrides), out=folder / "runs")


def variant(record: RunRecord, name: str) -> Variant:
    return next(v for v in record.variants if v.name == name)


def files(folder: Path, *overrides: str) -> set[str]:
    place = run_folder(config_of(folder, *overrides), folder / "runs")
    return {path.name for path in place.iterdir()}


class TestHalf:
    FP16 = ("precision={default: fp16, target: {metric: sqnr_db, min: 45}}",)

    def test_every_node_that_can_be_is_half_and_no_cache_is_written(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        record = ran(folder, *self.FP16)
        assert record.status == "met"
        assert [v.name for v in record.variants] == ["fp32", "fp16", "tuned"]
        half = variant(record, "fp16")
        assert half.nodes == {"int8": 0, "fp16": 3, "fp32": 0}
        assert half.sqnr_db is not None
        assert 45 < half.sqnr_db < 90  # rounded, but to eleven bits
        assert "calibration.cache" not in files(folder, *self.FP16)
        assert record.calibration is not None
        assert record.calibration.tensors == 0

    def test_what_was_measured_is_used_again(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        first, again = ran(folder, *self.FP16), ran(folder, *self.FP16)
        assert first.calibration is not None
        assert again.calibration is not None
        assert (first.calibration.reused, again.calibration.reused) == (False, True)

    def test_a_range_beyond_half_becomes_an_island(self, tmp_path: Path) -> None:
        net = tinymodels.Net()
        x = net.op("Relu", net.conv(net.input("input"), "conv1", 3, 8), out="relu1")
        x = net.op("Mul", x, net.const("large", [60000.0]), out="scaled")
        x = net.op("Mul", x, net.const("small", [1 / 60000.0]), out="back")
        folder = write_project(tmp_path, net.head(x, 8))
        work = work_of(folder, *self.FP16)
        stays = [name for name, a in work.untuned.nodes.items() if a.precision == "fp32"]
        assert "n_scaled" in stays
        assert "n_back" in stays
        assert "65504" in work.untuned.nodes["n_scaled"].reason
        record = ran(folder, *self.FP16)
        assert record.status == "met"

    def test_int8_with_half_around_it_needs_one_pass(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        overrides = ("precision.fallback=fp16", "precision.pin={n_conv2: fp32}")
        record = ran(folder, *overrides)
        assert variant(record, "int8").nodes == {"int8": 2, "fp16": 0, "fp32": 1}
        assert record.calibration is not None
        assert record.calibration.passes == 1
        place = run_folder(config_of(folder, *overrides), folder / "runs")
        model = onnx.load(place / "onnxruntime-emulate" / "model.onnx")
        kinds = {t.data_type for t in model.graph.initializer}
        assert onnx.TensorProto.FLOAT16 in kinds
        assert onnx.TensorProto.INT8 in kinds

    def test_tuning_pins_half_nodes_to_fp32(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        plain = variant(ran(folder, *self.FP16), "fp16").sqnr_db
        assert plain is not None
        target = f"precision={{default: fp16, target: {{metric: sqnr_db, min: {plain + 3}}}}}"
        record = ran(folder, target)
        tuned = variant(record, "tuned")
        assert record.status == "met"
        assert tuned.pinned
        assert tuned.nodes["fp32"] == len(tuned.pinned)

    def test_a_cache_in_the_config_gives_scales_and_the_pass_gives_ranges(
        self, tmp_path: Path
    ) -> None:
        folder = write_project(tmp_path)
        config = config_of(folder)
        run(config, out=folder / "runs")
        cache = run_folder(config, folder / "runs") / "calibration.cache"
        overrides = ("precision.fallback=fp16", f"calibration.cache='{cache}'")
        record = ran(folder, *overrides)
        assert record.calibration is not None
        assert record.calibration.pictures == 24
        assert record.calibration.methods == {"max": 8, "constant": 2}
        assert record.calibration.tensors == 10


class TestQuantizedAlready:
    QAT = "precision={default: qat, target: {metric: sqnr_db, min: 5}}"

    def test_it_is_taken_as_it_is(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, tinyqat.torch_residual())
        record = ran(folder, self.QAT)
        assert [v.name for v in record.variants] == ["fp32", "original", "qat", "tuned"]
        original, imported = variant(record, "original"), variant(record, "qat")
        assert imported.sqnr_db == original.sqnr_db
        assert imported.agreement == original.agreement
        assert imported.nodes["int8"] > 0
        place = run_folder(config_of(folder, self.QAT), folder / "runs")
        model = place / "onnxruntime-emulate" / "model.onnx"
        feeds = {"input": np.load(folder / "evaluation.npz")["input"]}
        expected = tinymodels.run(onnx.load(folder / "net.onnx"), feeds)
        found = tinymodels.run(onnx.load(model), feeds)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)

    def test_the_plan_is_written_with_its_pairs(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, tinyqat.torch_residual())
        ran(folder, self.QAT)
        place = run_folder(config_of(folder, self.QAT), folder / "runs")
        plan = ImportedPlan.from_json((place / "plan.json").read_text())
        assert plan == work_of(folder, self.QAT).untuned
        assert json.loads((place / "calibration.cache.json").read_text())["reads"]

    def test_tuning_takes_pairs_out(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, tinyqat.torch_residual())
        untuned = variant(ran(folder, self.QAT), "qat").sqnr_db
        assert untuned is not None
        target = f"precision={{default: qat, target: {{metric: sqnr_db, min: {untuned + 2}}}}}"
        record = ran(folder, target)
        assert variant(record, "tuned").pinned
        assert record.status == "met"

    def test_deploy_calibrates_what_the_file_does_not_say(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, tinyqat.torch_residual())
        record = ran(folder, self.QAT, BOTH)
        assert [v.backend for v in record.variants if v.name == "qat"] == [
            "onnxruntime/emulate",
            "onnxruntime/deploy",
        ]
        assert record.calibration is not None
        assert record.calibration.pictures == 24
        work = work_of(folder, self.QAT, BOTH)
        kept = load_table(run_folder(work.setup.config, folder / "runs") / "calibration.cache")
        assert (
            kept == work.calibrated.table
        )  # the scales that the engines have, the file's own among them
        assert work.setup.subject.imported is not None
        assert work.setup.subject.imported.table.scales.items() <= kept.scales.items()
        assert not work.workspace.made("calibrate")

    def test_what_tensorrt_lacks_needs_leave_to_be_changed(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, tinyqat.tensorflow_block())
        with pytest.raises(ModelError, match="allow_requantize"):
            ran(folder, self.QAT)
        allowed = "precision={default: qat, allow_requantize: true}"
        record = ran(folder, allowed)
        assert any("zero point" in note for note in record.notes)
        assert variant(record, "original").sqnr_db != variant(record, "qat").sqnr_db
