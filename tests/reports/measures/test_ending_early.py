"""A pass that ends as soon as the rest of the pictures cannot meet the target: never wrong about
that where it is certain, and where it goes by spread only on pictures in mixed order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trtune.datasets.batches import Batch
from trtune.reports.accuracy import Evaluation, Needed, evaluate
from trtune.reports.measures.classification import TopK
from trtune.reports.measures.uncertainty import is_mixed, misses_for_good
from trtune.reports.outputs import collect_outputs

Arrays = Mapping[str, NDArray[Any]]


@dataclass
class Rows:
    """Rows of `x` in batches; labels are the largest column."""

    x: NDArray[Any]
    batch: int = 8
    identity: str = "rows"
    skipped: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.x)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.x), self.batch):
            rows = self.x[start : start + self.batch]
            items = tuple(f"row{start + i}" for i in range(len(rows)))
            yield Batch({"x": rows}, items, rows.argmax(axis=1))


def same(feeds: Arrays) -> dict[str, NDArray[Any]]:
    return {"y": feeds["x"]}


def off_by(share: float) -> Any:
    """A model whose answers carry noise of `share` of the energy."""
    generator = np.random.default_rng(7)

    def run(feeds: Arrays) -> dict[str, NDArray[Any]]:
        x = feeds["x"]
        return {"y": (x + generator.normal(size=x.shape) * np.sqrt(share)).astype(np.float32)}

    return run


def measured(x: NDArray[Any], share: float, metric: str | None, needed: Needed) -> Evaluation:
    source = Rows(x)
    kept = collect_outputs(same, source)
    return evaluate(off_by(share), source, metric=metric, reference=kept, needed=needed)


def drawn(count: int, *, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("share", "needed", "whole"),
    [
        pytest.param(0.1, Needed(20.0, None, "sqnr_db"), False, id="10 dB where 20 are needed"),
        pytest.param(0.001, Needed(20.0, None, "sqnr_db"), True, id="30 dB where 20 are needed"),
        pytest.param(0.5, Needed(0.95, None, "agreement"), False, id="too few agree"),
        pytest.param(1e-6, Needed(0.95, None, "agreement"), True, id="all agree"),
        pytest.param(0.5, Needed(0.99, 1.0), False, id="too few are right"),
        pytest.param(1e-6, Needed(0.99, 1.0), True, id="all are right"),
        pytest.param(0.5, Needed(0.9, None, "cosine"), True, id="of a cosine nothing is known"),
    ],
)
def test_it_ends_where_the_target_is_out_of_reach(
    share: float, needed: Needed, whole: bool
) -> None:
    x = drawn(200)
    found = measured(x, share, "top1", needed)
    assert (found.whole, found.samples == 200) == (whole, whole)
    if not whole:
        every = measured(x, share, "top1", Needed(-1e9))
        value = getattr(every, needed.closeness) if needed.closeness else every.value
        assert value < needed.value


def test_ten_decibels_too_few_show_after_a_tenth() -> None:
    found = measured(drawn(800), 0.1, None, Needed(20.0, None, "sqnr_db"))
    assert 80 <= found.samples <= 128


@given(st.floats(0.01, 2.0), st.floats(-5.0, 25.0), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_what_ends_by_energy_would_have_missed(share: float, needed: float, seed: int) -> None:
    x = drawn(48, seed=seed)
    found = measured(x, share, None, Needed(needed, None, "sqnr_db"))
    every = measured(x, share, None, Needed(-1e9, None, "sqnr_db"))
    assert every.sqnr_db is not None
    assert found.whole or every.sqnr_db < needed


def test_without_kept_answers_it_never_ends() -> None:
    source = Rows(drawn(40))
    needed = Needed(99.0, None, "sqnr_db")
    assert evaluate(off_by(0.5), source, reference=same, needed=needed).whole


@pytest.mark.parametrize(("right", "total", "most"), [(3, 8, 7 / 8), (4, 4, 1.0), (0, 8, 0.5)])
def test_the_most_that_top1_can_still_be(right: int, total: int, most: float) -> None:
    measure = TopK(1)
    measure.start()
    x = np.eye(4, dtype=np.float32)
    labels = np.where(np.arange(4) < right, np.arange(4), (np.arange(4) + 1) % 4)
    measure.update({"y": x}, Batch({"x": x}, tuple("abcd"), labels))
    assert measure.most(total) == most


@pytest.mark.parametrize(
    ("scores", "total", "needed", "misses"),
    [
        pytest.param([0.0, 1.0] * 512, 50000, 0.6, True, id="by more than its spread"),
        pytest.param([0.0, 1.0] * 512, 50000, 0.55, False, id="by less"),
        pytest.param([0.0, 1.0] * 16, 50000, 2.0, False, id="too few"),
        pytest.param([0.0, 1.0] * 512, 1024, 2.0, False, id="there is no rest"),
        pytest.param([0.5] * 1024, 50000, 0.502, False, id="equal scores are not certain"),
    ],
)
def test_a_mean_that_stays_below(
    scores: list[float], total: int, needed: float, misses: bool
) -> None:
    assert misses_for_good(np.array(scores), total, needed) is misses


def test_pictures_class_by_class_are_not_mixed() -> None:
    classes = np.repeat(np.arange(8), 64)
    features = np.eye(8)[classes] + np.random.default_rng(0).normal(size=(512, 8)) * 0.1
    assert not is_mixed(features, 128)
    assert is_mixed(np.random.default_rng(1).permutation(features), 128)
    assert not is_mixed(features, 512)


def test_of_many_pictures_the_first_are_enough() -> None:
    x = np.random.default_rng(5).normal(size=(4096, 4)).astype(np.float32)
    found = measured(x, 1.0, "top1", Needed(0.9, 1.0))
    assert found.samples in (64, 128)
    by_class = x[np.argsort(x.argmax(axis=1), kind="stable")]
    found = measured(by_class, 1.0, "top1", Needed(0.9, 1.0))
    assert 400 <= found.samples < 4096  # only what is certain
