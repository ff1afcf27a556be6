"""What a run with preparation leaves, given to the commands for quantized models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tinymodels
from tinyproject import config_of, draw, write_project
from tinyquant import uneven

from trtune.calibrate.cache import load_table
from trtune.precision.graph.file import load_model
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.rewrite import quantize_weights, weight_scales
from trtune.precision.plan.rules import make_plan, weight_axis
from trtune.precision.quantized.importing import import_model, load_quantized
from trtune.run.pipeline import run, run_folder
from trtune.tools import cache_from_qdq, insert_qdq, migrate, strip_qdq

FORCED = "calibration.prepare=[scale, shift, round, bias]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder; its prepared model has moved tensors and rounded codes."""
    place = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        config = config_of(
            write_project(place, uneven(tinymodels.depthwise()), calibration=48), FORCED
        )
        record = run(config)
        assert {m for moves in record.prepared.values() for m in moves} >= {"scale", "round"}
        return place / run_folder(config)


def answers(path: Path) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options)
    return list(session.run(None, draw(uneven(tinymodels.depthwise()), 4, seed=9)))


def engine(folder: Path) -> Path:
    (found,) = folder.glob("onnxruntime*/**/model.onnx")
    return found


def test_the_prepared_model_with_its_cache_is_what_was_built(folder: Path, tmp_path: Path) -> None:
    insert_qdq(folder / "prepared.onnx", folder / "prepared.cache", tmp_path / "q.onnx")
    for ours, built in zip(answers(tmp_path / "q.onnx"), answers(engine(folder)), strict=True):
        np.testing.assert_allclose(ours, built, rtol=1e-4, atol=1e-5)


def test_taking_the_pairs_out_gives_model_and_cache_again(folder: Path, tmp_path: Path) -> None:
    strip_qdq(engine(folder), tmp_path / "fp32.onnx", tmp_path / "c.cache")
    stripped, kept = load_table(tmp_path / "c.cache"), load_table(folder / "prepared.cache")
    for tensor, scale in stripped.scales.items():
        assert scale == pytest.approx(kept.scales[tensor], rel=1e-6)
    insert_qdq(tmp_path / "fp32.onnx", tmp_path / "c.cache", tmp_path / "again.onnx")
    for ours, built in zip(answers(tmp_path / "again.onnx"), answers(engine(folder)), strict=True):
        np.testing.assert_allclose(ours, built, rtol=1e-4, atol=1e-5)


def test_what_was_built_is_imported_with_the_same_nodes_in_int8(folder: Path) -> None:
    imported = import_model(load_quantized(engine(folder))[0])
    prepared = load_model(folder / "prepared.onnx")
    assert set(imported.plan.int8_nodes) == set(make_plan(GraphView.of(prepared)).int8_nodes)


def test_a_cache_for_tensorrt_10_and_migration_take_it(folder: Path, tmp_path: Path) -> None:
    cache, left = cache_from_qdq(engine(folder), "10.14.1", tmp_path / "trt.cache")
    assert cache.scales
    assert left == ()
    migrate(folder / "prepared.onnx", folder / "prepared.cache", tmp_path / "explicit")
    for ours, built in zip(
        answers(tmp_path / "explicit" / "model.onnx"), answers(engine(folder)), strict=True
    ):
        np.testing.assert_allclose(ours, built, rtol=1e-4, atol=1e-5)


def test_quantizing_the_prepared_weights_again_gives_their_codes(folder: Path) -> None:
    """What TensorRT 10 does by itself: max|w| / 127 of each channel, and the nearest."""
    view = GraphView.of(load_model(folder / "prepared.onnx"))
    for name in make_plan(view).int8_nodes:
        node = view.by_name[name]
        weights, axis = view.constant(node.input[1]), weight_axis(node)
        scales = weight_scales(weights, axis)
        shape = [1] * weights.ndim
        shape[axis] = -1
        codes = quantize_weights(weights, scales, axis, lowest=-127)
        exact = codes.astype(np.float64) * scales.astype(np.float64).reshape(shape)
        np.testing.assert_allclose(exact, weights, rtol=1e-5, atol=1e-7 * np.abs(weights).max())
