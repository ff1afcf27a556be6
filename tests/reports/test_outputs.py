"""Every batch with its answers, some runs of a model being made side by side."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trtune.configs.errors import DataError
from trtune.datasets.batches import Batch
from trtune.reports.accuracy import Needed, evaluate
from trtune.reports.outputs import collect_outputs, each_answers

Arrays = Mapping[str, NDArray[Any]]
X = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float32)


@dataclass(frozen=True)
class Rows:
    batch: int
    identity: str = "rows"
    skipped: tuple[str, ...] = ()
    labels: bool = False

    @property
    def count(self) -> int:
        return len(X)

    def __iter__(self) -> Iterator[Batch]:
        for i in range(0, len(X), self.batch):
            x = X[i : i + self.batch]
            labels = np.full(len(x), 3) if self.labels else None
            yield Batch({"x": x}, tuple(f"row{i + j}" for j in range(len(x))), labels)


class Model:
    """Twice its input, after a wait that makes later runs end first; counts who runs at a time."""

    def __init__(self) -> None:
        self.lock, self.running, self.most, self.runs = threading.Lock(), 0, 0, 0

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        with self.lock:
            self.running, self.runs = self.running + 1, self.runs + 1
            self.most = max(self.most, self.running)
            wait = 0.004 if self.runs % 2 else 0.001
        time.sleep(wait)
        with self.lock:
            self.running -= 1
        return {"y": 2 * feeds["x"], "n": np.float32([1])}


@pytest.mark.parametrize("at_once", [1, 2, 4])
@pytest.mark.parametrize(("batch", "fixed"), [(5, None), (5, 1), (5, 2), (23, 1), (1, 1), (4, 8)])
def test_batches_come_in_order_however_many_run_at_once(
    batch: int, fixed: int | None, at_once: int
) -> None:
    model = Model()
    found = list(each_answers(model, Rows(batch), fixed_batch=fixed, at_once=at_once))
    assert [one.items for one, _ in found] == [one.items for one in Rows(batch)]
    np.testing.assert_array_equal(np.concatenate([a.samples["y"] for _, a in found]), 2 * X)
    assert model.most <= at_once
    assert model.runs == sum(-(-len(one) // (fixed or len(one))) for one in Rows(batch))
    alone = list(each_answers(Model(), Rows(batch), fixed_batch=fixed))
    for (_, one), (_, other) in zip(found, alone, strict=True):
        assert one.samples.keys() == other.samples.keys()
        assert one.whole.keys() == other.whole.keys()


def test_runs_really_are_side_by_side() -> None:
    both = threading.Barrier(2)  # raises unless two runs wait for each other

    def run(feeds: Arrays) -> dict[str, NDArray[Any]]:
        if not (feeds["x"] == X[-1]).all():  # the last of 23 has nobody to wait for
            both.wait(timeout=20)
        return {"y": feeds["x"]}

    assert len(list(each_answers(run, Rows(1), at_once=2))) == 23


def test_an_error_is_raised_at_its_batch() -> None:
    def run(feeds: Arrays) -> dict[str, NDArray[Any]]:
        if (feeds["x"] == X[7]).all(axis=1).any():
            raise DataError("the eighth")
        return {"y": feeds["x"]}

    found = each_answers(run, Rows(1), at_once=3)
    assert [batch.items for batch, _ in islice(found, 7)] == [(f"row{i}",) for i in range(7)]
    with pytest.raises(DataError, match="the eighth"):
        next(found)


def test_what_is_left_early_is_not_run_on() -> None:
    model = Model()
    answers = each_answers(model, Rows(1), at_once=2)
    for _ in range(3):
        next(answers)
    answers.close()
    ran = model.runs
    assert ran <= 3 + 3
    time.sleep(0.02)
    assert model.runs == ran


@pytest.mark.parametrize("batch", [1, 6])
def test_kept_outputs_and_evaluations_are_the_same(batch: int) -> None:
    alone = collect_outputs(Model(), Rows(batch))
    beside = collect_outputs(Model(), Rows(batch), at_once=3)
    assert beside.items == alone.items
    np.testing.assert_array_equal(beside.outputs["y"], alone.outputs["y"])

    def off(feeds: Arrays) -> dict[str, NDArray[Any]]:
        return {"y": np.round(2 * feeds["x"], 1)}

    found = [evaluate(off, Rows(batch), reference=alone, at_once=k) for k in (1, 3)]
    assert found[0] == found[1]


def test_a_pass_may_still_end_early() -> None:
    kept = collect_outputs(Model(), Rows(1))

    def wrong(feeds: Arrays) -> dict[str, NDArray[Any]]:
        return {"y": np.roll(feeds["x"], 1, axis=1)}

    found = evaluate(
        wrong,
        Rows(1, labels=True),
        metric="sqnr_db",
        reference=kept,
        needed=Needed(60.0, None, "sqnr_db"),
        at_once=2,
    )
    assert not found.whole
    assert found.samples < 23
