from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trtune.configs.errors import DataError, ModelError, TrtuneError
from trtune.datasets.batches import Batch, InputSpec
from trtune.reports.accuracy import (
    Evaluation,
    evaluate,
)
from trtune.reports.outputs import Layout, Run, StoredOutputs, answers, collect_outputs

Arrays = Mapping[str, NDArray[Any]]
RNG = np.random.default_rng(3)
X = RNG.normal(size=(23, 6)).astype(np.float32)
WEIGHTS = RNG.normal(size=(6, 4)).astype(np.float32)
LABELS = RNG.integers(0, 4, 23)
FLOAT_NOISE_DB = 1e-3
"""What the order of a float32 sum, which differs with batch, CPU and library, moves an SQNR by."""


@dataclass
class Rows:
    """A source of the rows of `x` in batches of `batch`."""

    x: NDArray[Any]
    labels: NDArray[Any] | None
    batch: int = 5
    identity: str = "rows"
    skipped: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.x)

    def __iter__(self) -> Iterator[Batch]:
        for i in range(0, len(self.x), self.batch):
            x = self.x[i : i + self.batch]
            labels = None if self.labels is None else self.labels[i : i + self.batch]
            yield Batch({"x": x}, tuple(f"row{i + j}" for j in range(len(x))), labels)


def fp32(feeds: Arrays) -> dict[str, NDArray[Any]]:
    return {"y": feeds["x"] @ WEIGHTS}


def rounded(feeds: Arrays) -> dict[str, NDArray[Any]]:
    return {"y": np.round(feeds["x"] @ WEIGHTS)}


def expected(batch_outputs: Run) -> tuple[float, float, float]:
    """top-1, SQNR and agreement as a plain script computes them over the whole data at once."""
    r, t = fp32({"x": X})["y"].astype(np.float64), batch_outputs({"x": X})["y"].astype(np.float64)
    noise = ((r - t) ** 2).sum()
    sqnr = 10 * np.log10((r**2).sum() / noise) if noise else math.inf
    return (
        float((t.argmax(1) == LABELS).mean()),
        float(sqnr),
        float((t.argmax(1) == r.argmax(1)).mean()),
    )


@pytest.mark.parametrize("batch", [1, 5, 23, 64])
@pytest.mark.parametrize("stored", [True, False], ids=["stored reference", "running reference"])
def test_all_numbers_in_one_pass_whatever_the_batch(batch: int, stored: bool) -> None:
    reference = collect_outputs(fp32, Rows(X, LABELS, 7)) if stored else fp32
    result = evaluate(rounded, Rows(X, LABELS, batch), metric="top1", reference=reference)
    top1, sqnr, agree = expected(rounded)
    assert (result.metric, result.samples) == ("top1", 23)
    assert result.value == pytest.approx(top1)
    assert result.sqnr_db == pytest.approx(sqnr, abs=FLOAT_NOISE_DB)
    assert result.agreement == pytest.approx(agree)


def test_without_a_reference_only_the_metric_is_measured() -> None:
    result = evaluate(fp32, Rows(X, LABELS), metric="top5")
    assert result == Evaluation(metric="top5", value=1.0, samples=23, error=0.0, output="y")


def test_without_a_metric_no_labels_are_needed() -> None:
    result = evaluate(fp32, Rows(X, None), reference=fp32)
    assert (result.value, result.sqnr_db, result.agreement, result.cosine) == (
        None, math.inf, 1.0, 1.0,
    )  # fmt: skip


@pytest.mark.parametrize("metric", ["sqnr_db", "cosine", "agreement"])
def test_a_fidelity_metric_is_the_value(metric: str) -> None:
    result = evaluate(rounded, Rows(X, None), metric=metric, reference=fp32)
    assert result.value == getattr(result, metric)


def test_a_function_scores_each_sample_or_a_whole_batch() -> None:
    def each(outputs: Arrays, batch: Batch) -> NDArray[Any]:
        return np.arange(len(batch)) == 0

    def whole(outputs: Arrays, batch: Batch) -> float:
        return 1.0 if len(batch) == 5 else 0.0

    assert evaluate(fp32, Rows(X, None), metric=each).value == pytest.approx(5 / 23)
    result = evaluate(fp32, Rows(X, None), metric=whole)
    assert result.value == pytest.approx(20 / 23)
    assert str(result.metric).endswith("whole")


def test_a_function_that_raises_is_named_with_the_batch() -> None:
    def broken(outputs: Arrays, batch: Batch) -> float:
        return float(outputs["z"].mean())

    with pytest.raises(TrtuneError, match=r"broken failed on the batch .* 'row0': KeyError: 'z'"):
        evaluate(fp32, Rows(X, None), metric=broken)


def test_a_function_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(TrtuneError, match=r"returned shape \(5, 4\) for 5 samples"):
        evaluate(fp32, Rows(X, None), metric=lambda outputs, batch: outputs["y"])


@given(st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None)
def test_a_fixed_batch_changes_nothing(fixed: int, batch: int) -> None:
    seen: set[int] = set()

    def run(feeds: Arrays) -> dict[str, NDArray[Any]]:
        seen.add(len(feeds["x"]))
        return rounded(feeds)

    result = evaluate(run, Rows(X, LABELS, batch), metric="top1", reference=fp32, fixed_batch=fixed)
    top1, sqnr, _ = expected(rounded)
    assert seen == {fixed}
    assert result.value == pytest.approx(top1)
    assert result.sqnr_db == pytest.approx(sqnr, abs=FLOAT_NOISE_DB)


def test_a_model_of_fixed_batch_runs_in_onnxruntime() -> None:
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [4, 6])],
        [onnx.helper.make_tensor_value_info("y", 1, [4, 4])],
        [onnx.numpy_helper.from_array(WEIGHTS, "w")],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(feeds: Arrays) -> dict[str, NDArray[Any]]:
        return {"y": session.run(None, dict(feeds))[0]}

    result = evaluate(run, Rows(X, LABELS, 7), metric="top1", reference=fp32, fixed_batch=4)
    assert result.value == expected(fp32)[0]
    assert result.sqnr_db is not None
    assert result.sqnr_db > 120
    assert result.agreement == 1.0


def test_a_model_that_ends_in_argmax_has_a_top1() -> None:
    result = evaluate(
        lambda feeds: {"class": fp32(feeds)["y"].argmax(axis=1)},
        Rows(X, LABELS),
        metric="top1",
    )
    assert result.value == expected(fp32)[0]


def test_one_of_several_outputs_is_scored_and_compared() -> None:
    def run(feeds: Arrays) -> dict[str, NDArray[Any]]:
        return {"features": feeds["x"] * 2, "y": rounded(feeds)["y"]}

    def reference(feeds: Arrays) -> dict[str, NDArray[Any]]:
        return {"features": feeds["x"], "y": fp32(feeds)["y"]}

    chosen = evaluate(run, Rows(X, LABELS), metric="top1", reference=reference, output="y")
    every = evaluate(run, Rows(X, LABELS), reference=reference)
    assert chosen.value == expected(rounded)[0]
    assert chosen.sqnr_db == pytest.approx(expected(rounded)[1], abs=FLOAT_NOISE_DB)
    assert every.sqnr_db is not None
    assert chosen.sqnr_db is not None
    assert every.sqnr_db < chosen.sqnr_db


def test_outputs_without_a_row_a_sample_are_kept_whole() -> None:
    def run(feeds: Arrays) -> dict[str, NDArray[Any]]:
        return {"version": np.array(3.0), "names": np.array(["a"] * 5), "y": fp32(feeds)["y"]}

    batch = next(iter(Rows(X, LABELS)))
    found = answers(run, batch)
    assert list(found.samples) == ["y"]
    assert list(found.everything) == ["version", "names", "y"]
    with pytest.raises(ModelError, match=r"no output is one score a class .*'y' \(3, 2\)"):
        evaluate(lambda feeds: {"y": np.zeros((3, 2))}, Rows(X, LABELS), metric="top1")


@pytest.mark.parametrize("metric", ["sqnr_db", "cosine"])
def test_each_output_is_compared_by_itself_and_the_worst_decides(metric: str) -> None:
    def reference(feeds: Arrays) -> dict[str, NDArray[Any]]:
        y = fp32(feeds)["y"]
        return {"boxes": 1000 * y, "scores": y / 1000, "picked": y.argmax(axis=1)}

    def run(feeds: Arrays) -> dict[str, NDArray[Any]]:
        y = fp32(feeds)["y"]
        return {"boxes": 1000 * y + 1, "scores": np.round(y) / 1000, "picked": y.argmin(axis=1)}

    result = evaluate(run, Rows(X, None), metric=metric, reference=reference)
    assert set(result.outputs) == {"boxes", "scores", "picked"}
    assert result.value == getattr(result.outputs["scores"], metric)
    assert result.outputs["boxes"].sqnr_db > 40
    assert result.sqnr_db == pytest.approx(expected(rounded)[1])


def test_the_output_that_fits_the_labels_is_scored() -> None:
    def run(feeds: Arrays) -> dict[str, NDArray[Any]]:
        y = fp32(feeds)["y"]
        return {"map": y[:, :, None] * y[:, None], "features": y.repeat(5, axis=1), "two": y[:, :2],
                "logits": y}  # fmt: skip

    result = evaluate(run, Rows(X, LABELS), metric="top1")
    assert (result.output, result.value) == ("logits", expected(fp32)[0])
    named = evaluate(run, Rows(X, LABELS), metric="top1", output="features")
    assert (named.output, named.value != result.value) == ("features", True)


def test_a_mean_has_the_textbook_error_and_a_pair_that_of_its_difference() -> None:
    result = evaluate(rounded, Rows(X, LABELS), metric="top1", reference=fp32)
    right = rounded({"x": X})["y"].argmax(1) == LABELS
    before = fp32({"x": X})["y"].argmax(1) == LABELS
    assert result.error == pytest.approx(right.std(ddof=1) / math.sqrt(23))
    change = right.astype(float) - before
    assert result.difference_error == pytest.approx(change.std(ddof=1) / math.sqrt(23))


class Largest:
    """The largest output over the whole data."""

    def start(self) -> None:
        self.found = -math.inf

    def update(self, outputs: Arrays, batch: Batch) -> None:
        self.found = max(self.found, float(outputs["y"].max()))

    def result(self) -> float:
        return self.found


@pytest.mark.parametrize("batch", [1, 5, 23])
def test_a_class_of_the_user_sees_every_batch(batch: int) -> None:
    result = evaluate(fp32, Rows(X, None, batch), metric=Largest)
    assert result.value == pytest.approx(float(fp32({"x": X})["y"].max()))
    assert str(result.metric).endswith(":Largest")


def picked(feeds: Arrays) -> dict[str, NDArray[Any]]:
    """The positive numbers of one sample, as many as there are, and their places."""
    row = feeds["x"][0]
    return {"values": row[row > 0], "places": np.flatnonzero(row > 0)}


PICKED = Layout(
    (InputSpec("x", (1, 6), "float32"),),
    (InputSpec("values", ("K",), "float32"), InputSpec("places", ("K",), "int64")),
)


def test_what_has_another_shape_is_counted_and_the_rest_compared() -> None:
    def run(feeds: Arrays) -> dict[str, NDArray[Any]]:
        found = picked(feeds)
        return found if feeds["x"][0, 0] > 0 else {n: a[1:] for n, a in found.items()}

    stored = collect_outputs(picked, Rows(X, None), fixed_batch=1, layout=PICKED)
    result = evaluate(run, Rows(X, None), reference=stored, fixed_batch=1, layout=PICKED)
    assert result.outputs["values"].left_out == int((X[:, 0] <= 0).sum())
    assert result.sqnr_db == math.inf
    nothing = evaluate(
        lambda feeds: {n: a[1:] for n, a in picked(feeds).items()},
        Rows(X, None),
        reference=stored,
        fixed_batch=1,
        layout=PICKED,
    )
    assert (nothing.sqnr_db, nothing.cosine) == (None, None)


def test_a_metric_of_the_user_sees_outputs_of_every_shape() -> None:
    def count(outputs: Mapping[str, Any], batch: Batch) -> NDArray[Any]:
        return np.array([len(row) for row in outputs["values"]])

    result = evaluate(picked, Rows(X, None), metric=count, fixed_batch=1, layout=PICKED)
    assert result.value == pytest.approx((X > 0).sum(axis=1).mean())


@pytest.mark.parametrize("batch", [1, 4])
def test_time_first_outputs_have_their_samples_along_the_second_axis(batch: int) -> None:
    layout = Layout(
        (InputSpec("x", (batch, 6), "float32"),), (InputSpec("y", (9, batch, 4), "float32"),)
    )

    def run(feeds: Arrays) -> dict[str, NDArray[Any]]:
        return {"y": np.repeat(fp32(feeds)["y"][None], 9, axis=0)}

    stored = collect_outputs(run, Rows(X, None), fixed_batch=batch, layout=layout)
    assert stored.outputs["y"].shape == (23, 9, 4)
    assert np.allclose(stored.outputs["y"][:, 3], fp32({"x": X})["y"], atol=1e-6)


def test_nan_outputs_are_wrong_answers_and_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    def run(feeds: Arrays) -> dict[str, NDArray[Any]]:
        return {"y": np.full((len(feeds["x"]), 4), np.nan, np.float32)}

    result = evaluate(run, Rows(X, LABELS), metric="top1", reference=fp32)
    assert (result.value, result.sqnr_db, result.agreement) == (0.0, -math.inf, 0.0)
    assert "92 elements of the outputs are NaN or Inf" in caplog.text


def test_a_broken_reference_names_the_item() -> None:
    def reference(feeds: Arrays) -> dict[str, NDArray[Any]]:
        y = fp32(feeds)["y"]
        y[feeds["x"][:, 0] == X[7, 0]] = np.nan
        return {"y": y}

    with pytest.raises(TrtuneError, match="output 'y' holds nan for 'row7'"):
        evaluate(fp32, Rows(X, None), reference=reference)


def test_outputs_of_pictures_have_no_agreement() -> None:
    result = evaluate(
        lambda feeds: {"mask": np.ones((len(feeds["x"]), 3, 8, 8))},
        Rows(X, None),
        reference=lambda feeds: {"mask": np.ones((len(feeds["x"]), 3, 8, 8))},
    )
    assert (result.agreement, result.sqnr_db) == (None, math.inf)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        pytest.param(None, "metric 'top1' needs labels", id="no labels"),
        pytest.param(np.where(np.arange(23) == 8, -1, 0), "label -1 of row8", id="negative"),
        pytest.param(LABELS + 1, "they seem to count from 1", id="counted from one"),
    ],
)
def test_labels_that_do_not_fit(labels: NDArray[Any] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(fp32, Rows(X, labels, 23), metric="top1")


@pytest.mark.parametrize("work", [evaluate, collect_outputs])
def test_empty_data_is_refused(work: Any) -> None:
    with pytest.raises(DataError, match="the data is empty"):
        work(fp32, Rows(X[:0], None))


def test_an_unknown_output_names_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"no output 'Y'; did you mean 'y'\?"):
        evaluate(fp32, Rows(X, LABELS), metric="top1", output="Y")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "top2"}, "unknown metric 'top2'; did you mean"),
        ({"metric": "cosine"}, "metric 'cosine' compares with a reference"),
        ({"reference": lambda feeds: {"z": feeds["x"]}}, "no such output in the reference"),
        (
            {"reference": StoredOutputs.of({"y": np.zeros((23, 4))}, ("other",) * 23)},
            "collected from other data",
        ),
    ],
)
def test_a_callers_bug_is_a_value_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(fp32, Rows(X, LABELS), **options)


def test_stored_outputs_keep_order_and_know_their_size() -> None:
    steps: list[tuple[str, int, int | None]] = []
    stored = collect_outputs(
        fp32, Rows(X, None, 10), progress=lambda *step: steps.append(step), what="fp32"
    )
    assert np.array_equal(stored.outputs["y"], np.concatenate([b for b in _batches(10)]))
    assert stored.nbytes == 23 * 4 * 4
    assert steps == [("fp32", 10, 23), ("fp32", 20, 23), ("fp32", 23, 23)]


def _batches(size: int) -> Iterator[NDArray[Any]]:
    for batch in Rows(X, None, size):
        yield fp32(batch.feeds)["y"]


def test_outputs_that_change_shape_are_stored_one_by_one() -> None:
    stored = collect_outputs(picked, Rows(X, None, 10), fixed_batch=1, layout=PICKED)
    assert [len(row) for row in stored.outputs["values"]] == (X > 0).sum(axis=1).tolist()
    assert [len(row) for row in stored.rows(3, 5)["places"]] == (X > 0).sum(axis=1)[3:5].tolist()


def test_large_outputs_lie_in_files() -> None:
    plain = collect_outputs(fp32, Rows(X, None, 4))
    stored = collect_outputs(fp32, Rows(X, None, 4), memory=100)
    assert stored.folder is not None
    assert isinstance(stored.pieces[-1]["y"], np.memmap)
    assert np.array_equal(stored.outputs["y"], plain.outputs["y"])
    assert evaluate(fp32, Rows(X, None, 7), reference=stored).sqnr_db == math.inf


def test_scores_beside_boxes_in_one_output_are_judged_apart() -> None:
    def joined(score: float) -> Run:
        def run(feeds: Arrays) -> Arrays:
            boxes = 300 + 100 * np.abs(fp32(feeds)["y"])
            scores = np.full((len(boxes), 16), score)
            return {"out": np.concatenate([boxes, scores], axis=1).astype(np.float32)}

        return run

    source = Rows(X, None)
    reference = collect_outputs(joined(0.1), source)
    lost = evaluate(joined(0.0), source, reference=reference)
    assert list(lost.outputs) == ["out[:, 0:4]", "out[:, 4:20]"]
    assert lost.outputs["out[:, 0:4]"].sqnr_db == math.inf
    assert lost.sqnr_db == pytest.approx(0.0)
    assert evaluate(joined(0.1), source, reference=reference).sqnr_db == math.inf
