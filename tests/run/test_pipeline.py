"""`run` and the stages end to end on tiny models: what they write, and what they give back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from PIL import Image
from tinyproject import BOTH, config_of, draw, fixed, log_of, record_of, write_project

import trtune
from trtune.calibrate.cache import Cache, dump_cache, read_cache
from trtune.configs.errors import CacheError, ConfigError, DataError, ModelError
from trtune.configs.load import load_config
from trtune.configs.schema import Config
from trtune.precision.plan.plan import PrecisionPlan
from trtune.reports.record import RunRecord
from trtune.reports.tables import read_layers
from trtune.run.pipeline import build, calibrate, compare, report, run, run_folder, tune

EVERYTHING = (
    BOTH,
    "precision.target={metric: top1, max_drop: 0}",
    "report={formats: [md, html, csv, json], latency: {warmup: 0, runs: 3, batch: 2}}",
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, RunRecord]:
    """A run that had to pin: its config, its folder, its record."""
    folder = write_project(tmp_path_factory.mktemp("done"), tinymodels.depthwise())
    config = config_of(folder, *EVERYTHING)
    record = run(config, out=folder / "runs", command="trtune run tiny.yaml")
    return config, run_folder(config, folder / "runs"), record


class TestRunFolder:
    def test_it_holds_what_the_contract_names(self, done: tuple[Config, Path, RunRecord]) -> None:
        files = {p.relative_to(done[1]).as_posix() for p in done[1].rglob("*") if p.is_file()}
        assert {
            "config.yaml", "calibration.cache", "calibration.cache.json", "plan.json",
            "onnxruntime-emulate/model.onnx", "onnxruntime-emulate/engine.json",
            "onnxruntime-deploy/model.onnx", "onnxruntime-deploy/engine.json",
            "polygraphy/inputs.json", "polygraphy/fp32.json",
            "polygraphy/onnxruntime-emulate.json", "polygraphy/onnxruntime-deploy.json",
            "layers.csv", "run.json", "report.md", "report.html", "log.txt",
        } <= files  # fmt: skip
        assert not [file for file in files if "/." in f"/{file}"]

    def test_its_name_is_that_of_the_run_and_a_key(
        self, done: tuple[Config, Path, RunRecord]
    ) -> None:
        assert re.fullmatch(r"tiny-[0-9a-f]{10}", done[1].name)

    def test_config_yaml_reads_back_as_the_same_config(
        self, done: tuple[Config, Path, RunRecord]
    ) -> None:
        assert load_config(done[1] / "config.yaml") == done[0]

    def test_the_cache_is_tensorrts_text_with_a_key_beside_it(
        self, done: tuple[Config, Path, RunRecord]
    ) -> None:
        cache = read_cache(done[1] / "calibration.cache")
        assert cache.algorithm == "EntropyCalibration2"
        assert {"input", "clip1", "clip2", "flat"} <= set(cache.scales)
        sidecar = json.loads((done[1] / "calibration.cache.json").read_text())
        assert sidecar["provenance"]["model"] == done[2].hashes["model"]
        assert set(sidecar["methods"].values()) == {"max", "constant"}

    def test_the_plan_gives_every_node_a_precision_and_a_reason(
        self, done: tuple[Config, Path, RunRecord]
    ) -> None:
        plan = PrecisionPlan.from_json((done[1] / "plan.json").read_text())
        assert plan.precision("n_expand") == "int8"
        assert plan.nodes["n_logits"].reason.startswith("pinned by the tuner: alone it leaves ")

    @pytest.mark.parametrize("lowering", ["emulate", "deploy"])
    def test_engine_json_says_what_every_layer_runs_in(
        self, done: tuple[Config, Path, RunRecord], lowering: str
    ) -> None:
        engine = json.loads((done[1] / f"onnxruntime-{lowering}" / "engine.json").read_text())
        assert engine["backend"] == f"onnxruntime/{lowering}"
        assert engine["precisions"]["n_expand"] == "int8"
        assert engine["precisions"]["n_logits"] == "fp32"
        assert engine["versions"]["onnxruntime"]
        assert engine["device"]
        assert engine["hashes"]["model"] == done[2].hashes["model"]
        untuned = done[1] / f"onnxruntime-{lowering}" / "untuned" / "engine.json"
        assert json.loads(untuned.read_text())["precisions"]["n_logits"] == "int8"

    def test_layers_csv_has_a_row_a_node(self, done: tuple[Config, Path, RunRecord]) -> None:
        rows = {row.node: row for row in read_layers(done[1] / "layers.csv")}
        assert len(rows) == 8
        expand = rows["n_expand"]
        assert (expand.op, expand.precision, expand.tensor) == ("Conv", "int8", "input")
        assert expand.macs == 32 * 3 * 8 * 8
        assert expand.parameters == 32 * 3 + 32
        assert expand.method == "max"
        assert expand.amax is not None
        assert expand.accumulated_sqnr_db is not None
        assert expand.alone_sqnr_db is not None
        assert rows["n_logits"].precision == "fp32"
        assert rows["n_pooled"].alone_sqnr_db is None

    def test_the_log_tells_the_stages(self, done: tuple[Config, Path, RunRecord]) -> None:
        log = (done[1] / "log.txt").read_text()
        assert "FP32 gate: logits differs by" in log
        assert "pin ('n_logits',): 1, target met" in log
        assert not re.search("(gate|calibrate|compare|alone): reused", log)


class TestRunJson:
    def test_it_has_every_key_of_the_contract(self, done: tuple[Config, Path, RunRecord]) -> None:
        value = json.loads((done[1] / "run.json").read_text())
        assert {"schema", "name", "key", "status", "baseline", "variants", "tuning",
                "calibration", "versions", "hashes"} <= set(value)  # fmt: skip
        assert value["schema"] == 1
        assert value["name"] == "tiny"
        assert done[1].name == f"tiny-{value['key']}"
        assert {"metric", "value", "samples"} <= set(value["baseline"])
        assert {"name", "backend", "value", "drop", "sqnr_db", "agreement", "latency_ms",
                "size_bytes", "nodes", "pinned", "not_honoured",
                } <= set(value["variants"][1])  # fmt: skip
        assert {"step", "pinned", "value", "builds", "seconds"} <= set(value["tuning"][0])
        assert {"method", "pictures", "seconds", "inference_seconds", "peak_rss_bytes",
                "tensors"} <= set(value["calibration"])  # fmt: skip
        assert {"onnx", "onnxruntime", "numpy", "trtune", "python"} <= set(value["versions"])
        assert set(value["hashes"]) == {"model", "calibration_data", "evaluation_data", "config"}

    def test_it_is_the_record_that_run_gives_back(
        self, done: tuple[Config, Path, RunRecord]
    ) -> None:
        assert RunRecord.from_json((done[1] / "run.json").read_text()) == done[2]
        assert done[2].command == "trtune run tiny.yaml"

    def test_every_backend_has_fp32_the_untuned_and_the_tuned(
        self, done: tuple[Config, Path, RunRecord]
    ) -> None:
        assert [(v.name, v.backend) for v in done[2].variants] == [
            (name, f"onnxruntime/{lowering}")
            for lowering in ("emulate", "deploy")
            for name in ("fp32", "int8", "tuned")
        ]

    def test_values_and_drops(self, done: tuple[Config, Path, RunRecord]) -> None:
        fp32, int8, tuned = done[2].variants[:3]
        assert (fp32.value, fp32.drop, fp32.pinned) == (1.0, 0.0, [])
        assert int8.value == pytest.approx(0.95)
        assert int8.drop == pytest.approx(0.05)
        assert (tuned.value, tuned.drop, tuned.pinned) == (1.0, 0.0, ["n_logits"])
        assert (fp32.top1, int8.top1, tuned.top1) == (fp32.value, int8.value, tuned.value)
        assert int8.agreement == pytest.approx(0.95)
        assert tuned.sqnr_db is not None
        assert int8.sqnr_db is not None
        assert tuned.sqnr_db > int8.sqnr_db > 30
        assert done[2].status == "met"

    def test_nodes_are_counted_by_precision(self, done: tuple[Config, Path, RunRecord]) -> None:
        counts = [variant.nodes for variant in done[2].variants[:3]]
        assert [c["int8"] for c in counts] == [0, 4, 3]
        assert [c["fp32"] for c in counts] == [4, 0, 1]

    def test_latency_is_of_what_runs_fast_only(self, done: tuple[Config, Path, RunRecord]) -> None:
        emulate, deploy = done[2].variants[:3], done[2].variants[3:]
        assert all(v.latency_ms is None and v.latency_note for v in emulate)
        for variant in deploy:
            assert variant.latency_ms is not None
            assert (variant.latency_ms.runs, variant.latency_ms.batch) == (3, 2)
            assert 0 < variant.latency_ms.median <= variant.latency_ms.p95

    def test_sizes_are_those_of_the_files(self, done: tuple[Config, Path, RunRecord]) -> None:
        for variant in done[2].variants:
            assert variant.path is not None
            folder = Path(done[0].model.path).parent if variant.name == "fp32" else done[1]
            file = folder / variant.path
            assert variant.size_bytes == file.stat().st_size

    def test_every_step_of_the_tuning(self, done: tuple[Config, Path, RunRecord]) -> None:
        steps = done[2].tuning
        assert [(s.step, s.action, s.pinned, s.met) for s in steps] == [
            (0, "start", [], False),
            (1, "pin", ["n_logits"], True),
        ]
        assert all(s.builds > 0 and not s.cached for s in steps)

    def test_what_calibration_did(self, done: tuple[Config, Path, RunRecord]) -> None:
        found = done[2].calibration
        assert found is not None
        assert (found.method, found.pictures, found.passes) == ("max", 24, 1)
        assert found.tensors == len(read_cache(done[1] / "calibration.cache").scales)
        assert found.methods == {"max": found.tensors - 2, "constant": 2}
        assert not found.reused
        assert found.peak_rss_bytes > 1 << 20
        assert found.outliers[0].ratio >= found.outliers[-1].ratio

    def test_the_report_is_one_file_with_the_result(
        self, done: tuple[Config, Path, RunRecord]
    ) -> None:
        html = (done[1] / "report.html").read_text()
        assert not re.search(r'(src|href)="(?!data:|#)', html)
        assert "n_logits" in html
        assert "95.00" in (done[1] / "report.md").read_text()


def only(folder: Path, *overrides: str) -> RunRecord:
    return run(config_of(folder, *overrides), out=folder / "runs")


class TestTargets:
    @pytest.mark.parametrize(
        ("overrides", "status", "values"),
        [
            pytest.param(["precision.target={metric: sqnr_db, min: 40}"], "met", [None, 42.6, 42.6],
                         id="sqnr_db: met as it is; FP32 itself has no value"),
            pytest.param(["precision.target={metric: sqnr_db, min: 46}"], "met", [None, 42.6, 46.3],
                         id="sqnr_db: met by pinning"),
            pytest.param(["precision.target={metric: sqnr_db, min: 200}", "precision.max_pins=2"],
                         "missed", [None, 42.6, 51.7], id="missed: the best found is kept"),
            pytest.param(["precision.target={metric: sqnr_db, min: 200}", "precision.max_pins=0"],
                         "missed", [None, 42.6, 42.6], id="missed: no pin is allowed"),
            pytest.param(["precision.target={metric: top1, min: 0.5}"], "met", [1.0, 1.0, 1.0],
                         id="top1, by its value"),
            pytest.param(["precision.target={metric: top5, max_drop: 0.01}"], "met",
                         [1.0, 1.0, 1.0], id="top5, by its drop"),
            pytest.param(["precision.target={metric: cosine, min: 0.9}"], "met", [None, 1.0, 1.0],
                         id="cosine"),
            pytest.param(["precision.target=null"], "met", [None, 42.6, 42.6],
                         id="no target: quantize and report closeness"),
        ],
    )  # fmt: skip
    def test_status_and_values(
        self, tmp_path: Path, overrides: list[str], status: str, values: list[float | None]
    ) -> None:
        record = only(write_project(tmp_path), *overrides)
        assert record.status == status
        for variant, value in zip(record.variants, values, strict=True):
            assert variant.value == (None if value is None else pytest.approx(value, abs=0.06))

    def test_without_a_target_nothing_is_tuned(self, tmp_path: Path) -> None:
        record = only(write_project(tmp_path), "precision.target=null")
        assert record.target is None
        assert record.tuning == []
        assert record.baseline.metric == "sqnr_db"

    def test_top1_stands_beside_closeness_where_there_are_labels(self, tmp_path: Path) -> None:
        record = only(write_project(tmp_path))
        assert [variant.top1 for variant in record.variants] == [1.0, 1.0, 1.0]
        assert record.variants[1].drop is None

    def test_without_labels_there_is_closeness_alone(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, labels=False)
        record = only(folder)
        assert record.status == "met"
        assert [variant.top1 for variant in record.variants] == [None] * 3
        assert "top-1 is not measured beside the target" in log_of(config_of(folder), folder)

    def test_a_metric_of_ones_own(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, labels=False)
        (folder / "mine.py").write_text(
            "import numpy as np\n"
            "def largest(outputs, batch):\n"
            "    return np.abs(outputs['logits']).max(axis=1)\n"
        )
        record = only(folder, f"precision.target={{metric: '{folder}/mine.py:largest', min: 0.1}}")
        proto = tinymodels.conv_relu()
        logits = tinymodels.run(proto, draw(proto, 20, seed=1))["logits"]
        expected = float(np.abs(logits).max(1).mean())
        assert record.variants[0].value == pytest.approx(expected, rel=1e-4)
        assert record.variants[1].value == pytest.approx(record.variants[0].value, rel=0.05)
        assert record.variants[1].drop is not None
        assert record.status == "met"

    def test_the_target_must_hold_on_every_backend(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        record = only(folder, BOTH, "precision.target={metric: sqnr_db, min: 43.5}")
        assert record.status == "met"
        start = record.tuning[0]
        assert not start.met
        assert "missed on onnxruntime/emulate: 42.62" in start.reason
        assert all(v.value is None or v.value >= 43.5 for v in record.variants if v.name == "tuned")

    def test_a_target_above_fp32_is_missed_and_says_so(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        rows = dict(np.load(folder / "evaluation.npz"))
        rows["labels"][:5] = (rows["labels"][:5] + 1) % 10
        np.savez(folder / "evaluation.npz", **rows)
        record = only(folder, "precision.target={metric: top1, min: 0.99}", "precision.max_pins=1")
        assert record.status == "missed"
        assert record.variants[0].value is not None
        assert record.notes[-1] == (
            "the FP32 model itself misses the target: its top-1 is "
            f"{100 * record.variants[0].value:.2f} %, and 99.00 % is asked for"
        )


def zero_rows(folder: Path) -> None:
    """RunData in which the second input is always zero."""
    for name in ("calibration", "evaluation"):
        rows = dict(np.load(folder / f"{name}.npz"))
        rows["meta"] = np.zeros_like(rows["meta"])
        np.savez(folder / f"{name}.npz", **rows)


class TestModels:
    @pytest.mark.parametrize(
        "make",
        [
            tinymodels.two_inputs,
            tinymodels.int64_input,
            tinymodels.opset11,
            tinymodels.two_outputs,
            tinymodels.dynamic_reshape,
            tinymodels.unnamed_nodes,
            tinymodels.concat,
            tinymodels.attention,
        ],
    )
    def test_it_goes_through(self, tmp_path: Path, make: Callable[[], onnx.ModelProto]) -> None:
        folder = write_project(tmp_path, make(), labels=False)
        config = config_of(folder, BOTH)
        record = run(config, out=folder / "runs")
        assert record.status == "met"
        for variant in record.variants:
            if variant.name == "fp32":
                continue
            assert variant.value is not None
            assert variant.value > 20
            assert variant.nodes["int8"] > 0
            assert variant.path is not None
            proto = onnx.load(run_folder(config, folder / "runs") / variant.path)
            assert [i.name for i in proto.graph.input] == [i.name for i in make().graph.input]

    @pytest.mark.parametrize("size", [1, 4])
    @pytest.mark.parametrize("method", ["max", "auto"])
    def test_a_fixed_batch_is_filled(self, tmp_path: Path, size: int, method: str) -> None:
        free = only(write_project(tmp_path / "free", evaluation=18), BOTH)
        folder = write_project(
            tmp_path / "fixed", fixed(tinymodels.conv_relu(), size), evaluation=18
        )
        record = only(
            folder, BOTH, f"calibration.method={method}", "report.latency={warmup: 0, runs: 1}"
        )
        assert record.status == "met"
        assert record.baseline.samples == 18
        if method == "max":
            for found, wanted in zip(record.variants, free.variants, strict=True):
                assert found.sqnr_db == pytest.approx(wanted.sqnr_db, abs=0.5)
        assert [v.latency_ms.batch for v in record.variants if v.latency_ms] == [size] * 3

    def test_what_normalising_did_is_noted(self, tmp_path: Path) -> None:
        record = only(write_project(tmp_path, tinymodels.opset11(), labels=False))
        assert "opset 11 upgraded to 13" in record.notes
        assert record.model["opset"] == 13

    def test_a_node_that_cannot_be_quantized_is_noted(self, tmp_path: Path) -> None:
        record = only(write_project(tmp_path, tinymodels.attention(), labels=False))
        (note,) = [note for note in record.notes if note.startswith("n_scores stays")]
        assert note.startswith("n_scores stays fp32: its weights are computed at run time")

    def test_nothing_quantizable_and_a_target_out_of_reach(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, tinymodels.nothing_quantizable(), labels=False)
        (folder / "mine.py").write_text("def none(outputs, batch):\n    return 0.0\n")
        config = config_of(
            folder, f"precision.target={{metric: '{folder}/mine.py:none', min: 0.5}}",
            "report.formats=[md, html, csv, json]",
        )  # fmt: skip
        record = run(config, out=folder / "runs")
        assert record.status == "missed"
        assert record.notes == [
            "no node runs in INT8: nothing to quantize: there is no Conv, ConvTranspose, Gemm, "
            "MatMul node",
            "the FP32 model itself misses the target: its none is 0, and 0.5 is asked for",
        ]
        assert record.calibration is None
        assert [s.action for s in record.tuning] == ["start"]
        assert "nothing is quantizable in this model" in log_of(config, folder)
        assert not (run_folder(config, folder / "runs") / "calibration.cache").exists()
        rows = read_layers(run_folder(config, folder / "runs") / "layers.csv")
        assert {row.precision for row in rows} == {"fp32"}

    def test_everything_pinned_is_the_fp32_model(self, tmp_path: Path) -> None:
        record = only(write_project(tmp_path), "precision.pin={'re:.*': fp32}", BOTH)
        assert record.status == "missed", "a target is not met by what went in"
        assert record.calibration is None
        int8 = record.variants[1]
        assert int8.nodes["int8"] == 0
        assert int8.value == float("inf")
        assert int8.pinned == ["n_conv1", "n_conv2", "n_logits"]

    def test_default_fp32_quantizes_nothing(self, tmp_path: Path) -> None:
        record = only(write_project(tmp_path), "precision.default=fp32")
        assert record.status == "met"
        assert [v.nodes["int8"] for v in record.variants] == [0, 0, 0]
        assert record.notes == []

    def test_an_input_that_is_always_zero_keeps_its_node_in_fp32(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, tinymodels.two_inputs(), labels=False)
        zero_rows(folder)
        record = only(folder)
        assert record.status == "met"
        assert "n_meta_fc stays fp32: its input 'meta' was zero in every calibration picture" in (
            record.notes
        )


class TestData:
    def test_evaluation_on_the_calibration_pictures_is_noted(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        text = (folder / "tiny.yaml").read_text()
        (folder / "tiny.yaml").write_text(
            text.replace("  evaluation: {path: evaluation.npz}\n", "")
        )
        record = only(folder)
        assert record.notes == [
            "accuracy was measured on the calibration pictures: name data.evaluation"
        ]
        assert record.baseline.samples == 24

    def test_pictures_left_out_are_counted_also_when_all_is_reused(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        rng = np.random.default_rng(0)
        for part, count in (("calibration", 10), ("evaluation", 6)):
            (folder / part).mkdir()
            for i in range(count):
                picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
                picture.save(folder / part / f"{i}.png")
        (folder / "calibration" / "3.png").write_bytes(b"no picture")
        (folder / "calibration" / "5.png").write_bytes(b"")
        (folder / "evaluation" / "2.png").write_bytes(b"no picture")
        config = config_of(
            folder,
            f"data={{calibration: {{source: images, path: '{folder}/calibration', batch: 4, "
            f"labels: null, on_error: skip}}, evaluation: {{path: '{folder}/evaluation'}}}}",
        )
        for _ in range(2):
            record = run(config, out=folder / "runs")
            assert record.calibration is not None
            assert record.calibration.pictures == 8
            assert record.calibration.skipped == ["3.png", "5.png"]
            assert record.baseline.samples == 5
            assert record.notes[-1] == "left out of data.evaluation, unreadable: 1 (2.png)"

    def test_a_picture_with_an_outlier_is_named(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, labels=False)
        rows = dict(np.load(folder / "calibration.npz"))
        rows["input"][7] *= 300
        np.savez(folder / "calibration.npz", **rows)
        record = only(folder)
        assert record.calibration is not None
        assert record.calibration.dominant[0].item == "7"
        assert record.calibration.dominant[0].worst_ratio > 50
        assert record.histograms[0].max == pytest.approx(
            max(
                o.max
                for o in record.calibration.outliers
                if o.tensor == record.histograms[0].tensor
            )
        )


class TestNamedCache:
    @pytest.fixture
    def made(self, tmp_path: Path) -> tuple[Path, Path]:
        """A project, and the cache that was made for its model."""
        folder = write_project(tmp_path / "here")
        config = config_of(folder)
        calibrate(config, out=folder / "runs")
        return folder, run_folder(config, folder / "runs") / "calibration.cache"

    def test_one_with_its_key_is_used(self, made: tuple[Path, Path]) -> None:
        folder, cache = made
        config = config_of(folder, f"calibration.cache={cache}")
        record = run(config, out=folder / "runs")
        assert record.status == "met"
        assert record.calibration is not None
        assert record.calibration.method == "cache calibration.cache"
        assert record.calibration.pictures == 0
        copy = read_cache(run_folder(config, folder / "runs") / "calibration.cache")
        assert copy.scales == read_cache(cache).scales
        assert f"calibration cache {cache} used as the config says" in log_of(config, folder)

    def test_one_without_a_key_is_used_because_it_is_named(self, made: tuple[Path, Path]) -> None:
        folder, cache = made
        scales = {name: 2 * scale for name, scale in read_cache(cache).scales.items()}
        mine = folder / "mine.cache"
        mine.write_text(dump_cache(Cache("TRT-8601-EntropyCalibration2", scales)))
        config = config_of(folder, f"calibration.cache={mine}")
        table = calibrate(config, out=folder / "runs")
        assert dict(table.scales) == scales
        assert table.provenance == {"source": "unkeyed", "file": "mine.cache"}

    def test_one_for_another_model_is_refused_unless_trusted(self, made: tuple[Path, Path]) -> None:
        folder, cache = made
        proto = onnx.load(folder / "net.onnx")
        proto.producer_name = "someone else"
        onnx.save(proto, folder / "net.onnx")
        named = f"calibration.cache={cache}"
        with pytest.raises(
            CacheError,
            match=rf"{cache} was made from another model \(its key says [0-9a-f]{{12}}, this one"
            r" is [0-9a-f]{12}\); calibrate again, or set calibration.trust_cache to use it",
        ):
            only(folder, named)
        assert only(folder, named, "calibration.trust_cache=true").status == "met"

    def test_tensors_that_it_lacks_are_counted(self, made: tuple[Path, Path]) -> None:
        folder, cache = made
        scales = dict(read_cache(cache).scales)
        scales["relu1_"] = scales.pop("relu1")
        mine = folder / "mine.cache"
        mine.write_text(dump_cache(Cache("TRT-8601-EntropyCalibration2", scales)))
        with pytest.raises(CacheError) as failure:
            only(folder, f"calibration.cache={mine}")
        assert str(failure.value).startswith(
            "the calibration cache belongs to another model: 1 of 3 tensors have no scale in it; "
            "nearest to 'relu1' is 'relu1_'"
        )


def products() -> onnx.ModelProto:
    """Matrix products of computed tensors only."""
    net = tinymodels.Net()
    x = net.op("Tanh", net.input("input"), out="tanh")
    x = net.op("MatMul", x, x, out="square1")
    net.op("MatMul", x, x, out="square2")
    return net.model({"square2": tinymodels.PICTURE})


class TestStages:
    def test_one_after_the_other_they_are_the_run(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, tinymodels.depthwise())
        config = config_of(folder, "precision.target={metric: top1, max_drop: 0}", BOTH)
        out = folder / "runs"
        table = calibrate(config, out=out)
        (emulate, deploy) = build(config, out=out)
        assert emulate.precisions["n_logits"] == "int8"
        assert deploy.backend == "onnxruntime/deploy"
        rows = compare(config, out=out)
        assert min(rows, key=lambda r: r.alone_sqnr_db or 99).node == "n_logits"
        record = tune(config, out=out, command="trtune tune tiny.yaml")
        assert record.status == "met"
        assert record.calibration is not None
        assert record.calibration.reused
        (emulate, _) = build(config, out=out)
        assert emulate.precisions["n_logits"] == "fp32"
        run_json = run_folder(config, out) / "run.json"
        assert RunRecord.from_json(run_json.read_text()) == record
        assert not (run_json.parent / "report.html").exists()
        whole = run(config, out=out)
        assert whole.variants == record.variants
        again = calibrate(config, out=out)
        assert again.scales == table.scales

    def test_build_of_one_backend(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        config = config_of(folder, BOTH)
        for name in ("onnxruntime/deploy", "onnxruntime"):
            infos = build(config, out=folder / "runs", backend=name)
            assert len(infos) == (1 if "/" in name else 2)

    def test_build_of_one_that_is_not_there(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        with pytest.raises(ConfigError) as failure:
            build(config_of(folder), out=folder / "runs", backend="onnxruntime/emulator")
        assert str(failure.value) == (
            "--backend 'onnxruntime/emulator' is none of the config's backends "
            "(onnxruntime/emulate); did you mean 'onnxruntime/emulate'?"
        )

    def test_compare_writes_the_layers(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        config = config_of(folder, "compare.alone=false")
        rows = compare(config, out=folder / "runs")
        assert read_layers(run_folder(config, folder / "runs") / "layers.csv") == rows
        assert {row.alone_sqnr_db for row in rows} == {None}
        assert all(row.accumulated_sqnr_db is not None for row in rows)

    def test_tuning_does_not_need_the_comparison(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        record = only(folder, "compare.alone=false", "precision.target={metric: sqnr_db, min: 46}")
        assert record.status == "met"
        assert record.variants[-1].pinned == ["n_logits"]

    def test_tune_needs_a_target(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        with pytest.raises(ConfigError, match=r"^precision\.target: nothing to tune for; say what"):
            tune(config_of(folder, "precision.target=null"), out=folder / "runs")

    @pytest.mark.parametrize(
        ("make", "why"),
        [
            pytest.param(tinymodels.nothing_quantizable,
                         "it has no Conv, ConvTranspose, Gemm, MatMul", id="no such operator"),
            pytest.param(products, "'n_square1': its weights are computed at run time (attention "
                         "pattern); 'n_square2': its weights are computed at run time (attention "
                         "pattern)", id="operators that cannot be"),
        ],
    )  # fmt: skip
    def test_calibrate_of_nothing_says_why(
        self, tmp_path: Path, make: Callable[[], onnx.ModelProto], why: str
    ) -> None:
        folder = write_project(tmp_path, make(), labels=False)
        with pytest.raises(ModelError) as failure:
            calibrate(config_of(folder), out=folder / "runs")
        assert str(failure.value) == (
            f"{folder}/net.onnx: nothing in it can be quantized, so there is nothing to calibrate "
            f"({why}); `trtune inspect` shows its nodes"
        )


class TestReport:
    def test_it_is_drawn_again_from_the_record_alone(
        self, done: tuple[Config, Path, RunRecord], tmp_path: Path
    ) -> None:
        for name in ("run.json", "layers.csv"):
            (tmp_path / name).write_bytes((done[1] / name).read_bytes())
        assert report([tmp_path, done[1] / "run.json"], formats=("md",)) == [done[2], done[2]]
        assert (tmp_path / "report.md").read_text() == (done[1] / "report.md").read_text()
        assert not (tmp_path / "report.html").exists()

    def test_without_layers(self, done: tuple[Config, Path, RunRecord], tmp_path: Path) -> None:
        (tmp_path / "run.json").write_bytes((done[1] / "run.json").read_bytes())
        report([tmp_path / "run.json"])
        assert (tmp_path / "report.html").is_file()

    def test_a_folder_without_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no such file; give a run's folder or its run\.json"):
            report([tmp_path])

    def test_what_is_no_run_is_left_out_with_a_note(
        self,
        done: tuple[Config, Path, RunRecord],
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        (tmp_path / "calibrated-only").mkdir()
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "run.json").write_text("{")
        found = report(
            [tmp_path / "calibrated-only", done[1], tmp_path / "broken"], formats=("md",)
        )
        assert found == [done[2]]
        assert [m.split(": ")[:2] for m in caplog.messages if "left out" in m] == [
            ["left out", f"{tmp_path}/calibrated-only/run.json"],
            ["left out", f"{tmp_path}/broken/run.json"],
        ]


def test_the_package_offers_the_same(tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    config = config_of(folder)
    table: Any = trtune.calibrate(config, out=folder / "runs")
    assert set(table.scales) >= {"input", "relu1", "flat"}
    assert trtune.run(config, out=folder / "runs").status == record_of(config, folder)["status"]
