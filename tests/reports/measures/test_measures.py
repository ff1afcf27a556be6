from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trtune.configs.errors import ConfigError, DataError, ModelError
from trtune.reports.measures.base import metric_name
from trtune.reports.measures.classification import class_scores, top_k
from trtune.reports.measures.fidelity import Fidelity, agreement, cosine, sqnr_db
from trtune.reports.measures.find import METRICS, find_metric


@pytest.mark.parametrize(
    ("scores", "label", "k", "expected"),
    [
        pytest.param([0.1, 0.7, 0.2], 1, 1, 1.0, id="the highest score is right"),
        pytest.param([0.1, 0.7, 0.2], 2, 1, 0.0, id="the second is wrong at k = 1"),
        pytest.param([0.1, 0.7, 0.2], 2, 2, 1.0, id="the second is right at k = 2"),
        pytest.param([0.5, 0.5, 0.0], 0, 1, 1.0, id="a tie goes to the lower index"),
        pytest.param([0.5, 0.5, 0.0], 1, 1, 0.0, id="a tie does not count twice"),
        pytest.param([0.5, math.nan, 0.0], 0, 1, 0.0, id="a NaN among the scores is wrong"),
        pytest.param([math.nan] * 3, 0, 3, 0.0, id="all NaN is wrong even at k = classes"),
        pytest.param([0.1, math.inf, 0.0], 1, 1, 1.0, id="an infinite score still ranks"),
        pytest.param([0.1, 0.2], 0, 5, 1.0, id="fewer classes than k are always right"),
    ],
)
def test_top_k(scores: list[float], label: int, k: int, expected: float) -> None:
    assert top_k(np.array([scores]), np.array([label]), k=k).tolist() == [expected]


@given(
    hnp.arrays(np.float32, (7, 9), elements=st.integers(-3, 3).map(float)),
    hnp.arrays(np.int64, 7, elements=st.integers(0, 8)),
)
def test_top1_is_argmax_and_top5_contains_it(scores: np.ndarray, labels: np.ndarray) -> None:
    assert np.array_equal(top_k(scores, labels, k=1), scores.argmax(axis=1) == labels)
    assert np.all(top_k(scores, labels, k=5) >= top_k(scores, labels, k=1))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        pytest.param((4, 10), (4, 10), id="N x C stays"),
        pytest.param((4, 10, 1, 1), (4, 10), id="trailing ones go"),
        pytest.param((4, 1, 1, 1), (4, 1), id="one class stays N x 1"),
    ],
)
def test_class_scores(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert class_scores(np.zeros(shape), "y").shape == expected


@pytest.mark.parametrize("shape", [(4,), (4, 10, 7), (4, 21, 8, 8)])
def test_outputs_that_are_not_class_scores_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"output 'heat' has shape .* \(N x C\)"):
        class_scores(np.zeros(shape), "heat")


def test_fidelity_adds_up_over_batches() -> None:
    r = np.array([[3.0, 4.0], [0.0, 2.0]])
    t = np.array([[3.0, 4.5], [1.0, 2.0]])
    whole = Fidelity().add("y", r, t).add_classes(r, t)
    parts = Fidelity()
    for i in range(2):
        parts = parts.add("y", r[i : i + 1], t[i : i + 1]).add_classes(r[i : i + 1], t[i : i + 1])
    assert parts == whole
    assert sqnr_db(whole) == pytest.approx(10 * math.log10(29 / 1.25))
    assert cosine(whole) == pytest.approx(31 / math.sqrt(29 * 34.25))
    assert agreement(whole) == 1.0


def test_a_nan_in_the_tested_outputs_is_the_worst_result() -> None:
    r, t = np.array([[1.0, 2.0]]), np.array([[1.0, math.nan]])
    sums = Fidelity().add("y", r, t).add_classes(r, t)
    assert (sqnr_db(sums), cosine(sums), agreement(sums)) == (-math.inf, 0.0, 0.0)


def test_agreement_without_class_scores_says_what_to_use() -> None:
    with pytest.raises(ModelError, match="use sqnr_db or cosine"):
        agreement(Fidelity())


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_known_metric_is_found_by_name(name: str) -> None:
    assert find_metric(name) == name


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown metric 'top_1'; did you mean 'top1'\?"):
        find_metric("top_1")


def test_a_metric_of_the_user_is_found_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "my_trtune_metrics.py").write_text("def iou(outputs, batch):\n    return 0.5\n")
    metric = find_metric("my_trtune_metrics:iou", base_dir=tmp_path)
    assert not isinstance(metric, str)
    assert metric_name(metric) == "my_trtune_metrics:iou"


def test_a_metric_that_cannot_be_imported_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot import 'no_such_module_here'"):
        find_metric("no_such_module_here:f", base_dir=tmp_path)
