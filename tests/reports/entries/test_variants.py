"""What the record says of a variant."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from tinyproject import write_project

from trtune.precision.graph.file import load_model
from trtune.reports.accuracy import Evaluation
from trtune.reports.entries.variants import fp32_bytes, top1_of


def test_the_size_of_fp32_counts_weights_in_files_of_their_own(tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    path = folder / "net.onnx"
    whole = fp32_bytes(load_model(path), path)
    assert whole == path.stat().st_size
    onnx.save(
        onnx.load(path), path,
        save_as_external_data=True, location="net.data", size_threshold=0,
    )  # fmt: skip
    outside = fp32_bytes(load_model(path), path)
    assert path.stat().st_size < outside < whole


@pytest.mark.parametrize(
    ("metric", "value"), [("top1", 0.5), ("top5", None), (None, None), ("mine:f", None)]
)
def test_top1_is_what_was_counted_as_that(metric: str | None, value: float | None) -> None:
    assert top1_of(Evaluation(metric, 0.5, 10)) == value
