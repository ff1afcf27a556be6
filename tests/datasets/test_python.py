from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from trtune.configs.errors import DataError
from trtune.datasets.batches import InputSpec
from trtune.datasets.code import importable, load_function
from trtune.datasets.pictures.preprocess import Preprocess
from trtune.datasets.python import PythonSource
from trtune.datasets.selection import Selection

ROW = [InputSpec("x", ("N", 2), "float32")]
CODE = """
import numpy as np

def rows(sizes=(3, 4, 0, 3), offset=0, labels="labels"):
    start = offset
    for size in sizes:
        numbers = np.arange(start, start + size)
        yield {"x": np.stack([numbers, -numbers], 1).astype(np.float32), labels: numbers}
        start += size

def breaks():
    yield {"x": np.zeros((2, 2), np.float32)}
    raise KeyError("image_7")

def pictures():
    yield {"x": np.full((2, 4, 4, 3), 255, np.uint8)}

def late():
    import trtune_test_helper
    yield {"x": trtune_test_helper.ROWS}

def broken():
    rows = np.zeros((4, 2), np.float32)
    yield {"x": rows}
    rows = rows.copy()
    rows[1] = np.inf
    yield {"x": rows}

def a_list():
    return [{"x": np.zeros((1, 2))}] * 3

def a_tuple():
    yield np.zeros((1, 2)), 3

def ends_with_none():
    yield None

def text():
    yield {"x": ["a", "b"]}

def uneven():
    yield {"x": np.zeros((3, 2), np.float32), "labels": [1]}

def no_batches():
    return 3

NUMBER = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "trtune_test_data.py").write_text(CODE)
    (tmp_path / "trtune_test_helper.py").write_text("ROWS = [[1.0, 2.0]]")
    return tmp_path


def source(folder: Path, name: str, **options: object) -> PythonSource:
    return PythonSource(f"trtune_test_data:{name}", ROW, base_dir=folder, **options)  # type: ignore[arg-type]


def numbers(data: PythonSource) -> list[list[int]]:
    return [[int(n) for n in batch.feeds["x"][:, 0]] for batch in data]


def test_batches_of_any_size_are_cut_to_the_wanted_one(folder: Path) -> None:
    data = source(folder, "rows", batch=4)
    for _ in range(2):
        assert numbers(data) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    last = list(data)[-1]
    assert last.items == ("8", "9")
    assert last.labels is not None
    assert last.labels.tolist() == [8, 9]
    assert (data.count, data.skipped) == (None, ())


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        pytest.param(Selection(skip=2), [[2, 3, 4, 5], [6, 7, 8, 9]], id="skip"),
        pytest.param(Selection(skip=1, take=3), [[1, 2, 3]], id="skip and take"),
        pytest.param(Selection(take=3), [[0, 1, 2]], id="take"),
        pytest.param(Selection(sample=3, seed=3), [[4, 5, 8]], id="sample: as for arrays"),
    ],
)
def test_selection_counts_rows_over_all_batches(
    folder: Path, selection: Selection, expected: list[list[int]]
) -> None:
    assert numbers(source(folder, "rows", selection=selection, batch=4)) == expected


def test_args_reach_the_function(folder: Path) -> None:
    data = source(folder, "rows", args={"sizes": [2], "offset": 5})
    assert numbers(data) == [[5, 6]]


def test_labels_by_another_name_or_none(folder: Path) -> None:
    args = {"sizes": [1], "labels": "target"}
    (named,) = source(folder, "rows", args=args, labels="target")
    assert named.labels is not None
    assert named.labels.tolist() == [0]
    (left_out,) = source(folder, "rows", args={"sizes": [1]}, labels=None)
    assert left_out.labels is None


def test_pictures_are_preprocessed(folder: Path) -> None:
    spec = [InputSpec("x", (None, 3, 2, 2), "float32")]
    (batch,) = PythonSource(
        "trtune_test_data:pictures", spec, base_dir=folder, preprocess=Preprocess(crop=2)
    )
    assert batch.feeds["x"].shape == (2, 3, 2, 2)
    assert (batch.feeds["x"] == 1).all()


def test_what_the_function_imports_while_it_runs_is_found(folder: Path) -> None:
    before = list(sys.path)
    (batch,) = source(folder, "late")
    assert batch.feeds["x"].tolist() == [[1, 2]]
    assert sys.path == before


def test_a_list_of_batches_will_do(folder: Path) -> None:
    assert [len(b) for b in source(folder, "a_list")] == [3]


def test_what_the_function_raises_says_in_which_batch(folder: Path) -> None:
    batches = iter(source(folder, "breaks", batch=1))
    assert [next(batches).items, next(batches).items] == [("0",), ("1",)]
    message = "trtune_test_data:breaks failed in batch 1: KeyError: 'image_7'"
    with pytest.raises(DataError, match=message) as caught:
        next(batches)
    cause = caught.value.__cause__
    assert isinstance(cause, KeyError)
    assert cause.__traceback__ is not None
    frames = []
    trace = cause.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert frames[-1] == "breaks"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("broken", "batch 1 of .*, item 5: Inf in 2 of 2 values", id="Inf"),
        pytest.param("a_tuple", "batch 0 of .* is a tuple, not a dict of arrays", id="tuple"),
        pytest.param("ends_with_none", "is a NoneType, not a dict", id="None"),
        pytest.param("text", "'x' is <U1, not an array of numbers", id="text"),
        pytest.param("uneven", "'x' 3, 'labels' 1", id="lengths differ"),
        pytest.param("no_batches", "TypeError: 'int' object is not iterable", id="no batches"),
    ],
)
def test_what_a_function_can_get_wrong(folder: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(source(folder, name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"args": {"sizes": []}}, "rows is empty", id="no batches"),
        pytest.param({"args": {"sizes": [0]}}, "rows is empty", id="batches without rows"),
        pytest.param({"selection": Selection(skip=10)}, "it has 10, and `skip`", id="all skipped"),
        pytest.param({"args": {"size": 1}}, "unexpected keyword argument 'size'", id="args"),
    ],
)
def test_no_rows(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(source(folder, "rows", **options))


def test_identity_is_what_is_fed(folder: Path) -> None:
    base = source(folder, "rows").identity
    assert base == source(folder, "rows", batch=3, args={"sizes": [10]}).identity
    others = [
        source(folder, "rows", selection=Selection(take=9)).identity,
        source(folder, "rows", labels=None).identity,
        source(folder, "rows", args={"offset": 1}).identity,
    ]
    assert len({base, *others}) == 4


def test_a_file_and_its_function(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "trtune_test_here.py").write_text("def f(): return 5")
    assert load_function("sub/trtune_test_here.py:f", folder)() == 5


def test_the_module_beside_the_config_wins_over_its_namesake(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trtune_test_twin.py").write_text(f"def f(): return {name!r}")
    found = [load_function("trtune_test_twin:f", tmp_path / n)() for n in ("a", "b", "a")]
    assert found == ["a", "b", "a"]


def test_an_installed_module_needs_no_folder() -> None:
    assert load_function("math:sqrt")(9) == 3
    assert load_function("numpy:zeros", Path("/nowhere")) is np.zeros


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        pytest.param("trtune_test_data", "must be 'module:function'", id="no colon"),
        pytest.param("trtune_test_data:", "must be 'module:function'", id="no function"),
        pytest.param("trtune_test_none:f", "cannot import 'trtune_test_none'.*looked in", id="mod"),
        pytest.param("none.py:f", "no such file: .*none.py", id="no file"),
        pytest.param(
            "trtune_test_data:row", "no function 'row'; did you mean 'rows'", id="function"
        ),
        pytest.param("trtune_test_data:NUMBER", "no function 'NUMBER'", id="not callable"),
        pytest.param("trtune_test_bad:f", "ZeroDivisionError: division by zero", id="import fails"),
    ],
)
def test_references_that_lead_nowhere(folder: Path, reference: str, message: str) -> None:
    (folder / "trtune_test_bad.py").write_text("1 / 0")
    with pytest.raises(DataError, match=message):
        load_function(reference, folder)


def test_importable_without_a_folder_changes_nothing() -> None:
    before = list(sys.path)
    with importable(None):
        assert sys.path == before
