from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtune.calibrate.cpu.counter import Counter
from trtune.calibrate.histogram import Histogram, load_histograms, save_histograms


def counted(values: list[list[float]]) -> Histogram:
    counter = Counter()
    rows = np.array(values, np.float32)
    counter.add(tuple(map(str, range(len(rows)))), rows)
    return counter.histogram()


def same(left: Histogram, right: Histogram) -> bool:
    return (
        left.maximum == right.maximum
        and np.array_equal(left.counts, right.counts)
        and np.array_equal(left.pictures.counts, right.pictures.counts)
        and left.pictures.item == right.pictures.item
        and left.pictures.runner_up == right.pictures.runner_up
    )


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=20).filter(lambda name: "\0" not in name),
        st.lists(
            st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=3, max_size=3),
            min_size=1,
            max_size=4,
        ),
        max_size=3,
    )
)
def test_they_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, list[list[float]]]
) -> None:
    path = tmp_path_factory.mktemp("histograms") / "h.npz"
    histograms = {name: counted(values) for name, values in drawn.items()}
    save_histograms(path, histograms)
    found = load_histograms(path)
    assert list(found) == list(histograms)
    assert all(same(found[name], histograms[name]) for name in histograms)


def test_names_are_anything(tmp_path: Path) -> None:
    names = ["a/b: c", "0/values", "größe", "names"]
    save_histograms(tmp_path / "h.npz", {name: counted([[1.0, 2.0]]) for name in names})
    assert list(load_histograms(tmp_path / "h.npz")) == names
    assert [p.name for p in tmp_path.iterdir()] == ["h.npz"]
