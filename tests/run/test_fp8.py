"""Whole runs with FP8: as the default, pinned, and as the tuner's cheap rung beside INT8."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tinymodels import Net
from tinyproject import BOTH, config_of, write_project

from trtune.calibrate.cache import load_table
from trtune.configs.errors import ConfigError
from trtune.reports.record import RunRecord, Variant
from trtune.run.backends import check_precisions
from trtune.run.naming import run_folder
from trtune.run.pipeline import run

LADDER = "precision={target: {metric: sqnr_db, min: %s}, ladder: [int8, fp8, fp16, fp32]}"


COST_OF_NOTHING = "none: it multiplies as fast as INT8"
AMPERE = '{name: tensorrt_rtx, compute_capabilities: ["8.6"]}'


def ran(folder: Path, *overrides: str) -> RunRecord:
    return run(config_of(folder, *overrides), out=folder / "runs")


def variant(record: RunRecord, name: str, backend: str = "onnxruntime/emulate") -> Variant:
    return next(v for v in record.variants if v.name == name and v.backend == backend)


def place(folder: Path, *overrides: str) -> Path:
    return run_folder(config_of(folder, *overrides), folder / "runs")


def spread() -> onnx.ModelProto:
    """Channels that differ by a factor of 3000 in front of a convolution: INT8 loses them."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("input"), "conv1", 3, 8), out="relu1")
    gains = np.geomspace(1, 3000, 8).reshape(1, 8, 1, 1)
    x = net.op("Mul", x, net.const("gains", gains), out="spread")
    weights = np.random.default_rng(4).standard_normal((8, 8, 3, 3)) / gains / 8
    net.initializers.append(numpy_helper.from_array(weights.astype(np.float32), "conv2_w"))
    x = net.op("Conv", x, "conv2_w", out="conv2", kernel_shape=[3, 3], pads=[1] * 4)
    return net.head(x, 8)


class TestDefault:
    FP8 = ("precision={default: fp8, target: {metric: sqnr_db, min: 20}}",)

    def test_every_node_that_can_be_is_fp8(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        record = ran(folder, *self.FP8)
        assert record.status == "met"
        assert [v.name for v in record.variants] == ["fp32", "fp8", "tuned"]
        found = variant(record, "fp8")
        assert found.nodes["fp8"] == 3
        assert found.nodes["int8"] == 0
        assert found.sqnr_db is not None
        assert 20 < found.sqnr_db < 45  # rounded to four bits
        model = onnx.load(place(folder, *self.FP8) / "onnxruntime-emulate" / "model.onnx")
        kinds = {t.data_type for t in model.graph.initializer if "zero_point" in t.name}
        assert kinds == {onnx.TensorProto.FLOAT8E4M3FN}

    @pytest.mark.parametrize("method", ["percentile", "entropy", "mse", "auto"])
    def test_every_method_has_ranges_for_it(self, tmp_path: Path, method: str) -> None:
        folder = write_project(tmp_path)
        overrides = (*self.FP8, f"calibration.method={method}")
        record = ran(folder, *overrides)
        sqnr = variant(record, "fp8").sqnr_db
        assert sqnr is not None
        assert sqnr > 15
        table = load_table(place(folder, *overrides) / "calibration.cache")
        assert method == "percentile" or table.float8 or method == "auto"
        again = ran(folder, *overrides)
        assert again.calibration is not None
        assert again.calibration.reused

    def test_nothing_is_prepared_of_itself(self, tmp_path: Path) -> None:
        record = ran(write_project(tmp_path), *self.FP8, "calibration.prepare=auto")
        assert record.prepared == {}

    def test_deploy_says_that_it_stays_float(self, tmp_path: Path) -> None:
        record = ran(write_project(tmp_path), *self.FP8, BOTH)
        found = variant(record, "fp8", "onnxruntime/deploy")
        assert len(found.not_honoured) == 3
        assert all("no float8 kernels" in line for line in found.not_honoured)


class TestLadder:
    def test_a_layer_that_int8_hurts_is_moved_to_fp8_first(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, spread())
        override = LADDER % 18
        record = ran(folder, override)
        int8, tuned = variant(record, "int8"), variant(record, "tuned")
        assert int8.sqnr_db is not None
        assert int8.sqnr_db < 18
        assert record.status == "met"
        assert "n_conv2" in tuned.moved
        assert tuned.pinned == []
        costs = {pin.node: pin.cost for pin in tuned.pins}
        assert costs["n_conv2"] == "none: it multiplies as fast as INT8"
        assert [step.action for step in record.tuning][:2] == ["start", "move"]
        assert record.tuning[-1].moved == tuned.moved
        plan = json.loads((place(folder, override) / "plan.json").read_text())
        assert plan["nodes"]["n_conv2"]["precision"] == "fp8"
        assert plan["nodes"]["n_conv2"]["origin"] == "tuner"
        again = ran(folder, override)
        assert again.tuning[-1].cached
        assert variant(again, "tuned").moved == tuned.moved

    def test_what_fp8_does_not_reach_is_pinned_higher(self, tmp_path: Path) -> None:
        record = ran(write_project(tmp_path, spread()), LADDER % 45)
        tuned = variant(record, "tuned")
        assert tuned.pinned
        assert {pin.precision for pin in tuned.pins} <= {"fp8", "fp16", "fp32"}
        assert all(p.cost != COST_OF_NOTHING for p in tuned.pins if p.node in tuned.pinned)
        actions = [step.action for step in record.tuning]
        assert actions.index("move") < actions.index("pin")

    def test_without_the_hardware_fp8_is_left_out_with_a_note(self, tmp_path: Path) -> None:
        ampere = (
            'backends=[{name: onnxruntime}, {name: tensorrt_rtx, compute_capabilities: ["8.6"]}]'
        )
        record = ran(write_project(tmp_path, spread()), LADDER % 18, ampere)
        assert not variant(record, "tuned").moved
        assert variant(record, "tuned").pinned
        assert any("fp8 is left out: tensorrt_rtx: GPUs of compute capability 8.6" in note
                   for note in record.notes)  # fmt: skip

    def test_reports_say_what_pins_cost(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, spread())
        overrides = (LADDER % 18, "report.formats=[md, html, csv, json]")
        ran(folder, *overrides)
        text = (place(folder, *overrides) / "report.md").read_text()
        assert "in FP8, at no cost in speed" in text
        html = (place(folder, *overrides) / "report.html").read_text()
        assert "What the pins cost" in html
        assert 'class="badge fp8"' in html


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(
            ("precision={default: fp8}", f"backends=[{AMPERE}]"),
            "precision.default is fp8, and GPUs of compute capability 8.6 do not multiply it",
            id="a GPU without",
        ),
        pytest.param(
            ("precision.pin={n_conv2: fp8}", "backends=[{name: tensorrt, typing: weak}]"),
            "precision.pin.n_conv2 is fp8, and TensorRT's weak typing has no FP8",
            id="weak typing",
        ),
    ],
)  # fmt: skip
def test_what_takes_no_fp8_is_refused_early(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    config = config_of(write_project(tmp_path), *overrides)
    with pytest.raises(ConfigError, match=message):
        check_precisions(config)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[fp8, int8]", "each rung once and from fast to exact"),
        ("[int8, int8, fp32]", "each rung once and from fast to exact"),
        ("[fp8, fp32]", "begins with default, int8; found fp8"),
        ("[int8, fp4]", "'fp4' is not one of int8, fp8, fp16, bf16, fp32"),
    ],
)
def test_ladders_that_are_none(tmp_path: Path, value: str, message: str) -> None:
    folder = write_project(tmp_path)
    with pytest.raises(ConfigError, match=message):
        config_of(folder, f"precision.ladder={value}")


def test_a_pin_to_fp8_is_kept(tmp_path: Path) -> None:
    record = ran(write_project(tmp_path), "precision.pin={n_conv2: fp8}")
    found = variant(record, "tuned")
    assert found.moved == ["n_conv2"]
    assert found.pinned == []
    assert found.nodes["fp8"] == 1
