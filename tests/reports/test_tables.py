from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtune.configs.errors import DataError
from trtune.reports.record import Baseline, LayerRow, RunRecord, Variant
from trtune.reports.summary import TIMES
from trtune.reports.tables import (
    EMULATED,
    compare_table,
    dump_layers,
    layers_frame,
    load_layers,
    pinned_nodes,
    read_layers,
    result_frame,
    result_table,
    worst_layers,
    write_layers,
)

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=12)
NUMBERS = st.none() | st.floats(allow_nan=False)


def row(node: str = "n", **values: object) -> LayerRow:
    base = {"op": "Conv", "shape": "1x8", "macs": 9, "parameters": 4}
    return LayerRow.model_validate(
        {"node": node, "precision": "int8", "reason": "default", **base, **values}
    )


def column(record: RunRecord, title: str) -> list[str]:
    table = result_table(record)
    return [cells[table.columns.index(title)] for cells in table.rows]


@given(
    st.lists(
        st.builds(
            row,
            NAMES,
            reason=NAMES,
            tensor=NAMES,
            amax=NUMBERS,
            alone_sqnr_db=NUMBERS,
            macs=st.integers(0, 2**60),
        )
    )
)
def test_layers_csv_is_read_back_as_it_was_written(rows: list[LayerRow]) -> None:
    assert load_layers(dump_layers(rows)) == rows


def test_layers_csv_on_disk(tmp_path: Path, layers: list[LayerRow]) -> None:
    write_layers(tmp_path / "layers.csv", layers)
    assert read_layers(tmp_path / "layers.csv") == layers
    assert len(pd.read_csv(tmp_path / "layers.csv")) == 82


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "not a table of layers", id="an empty file"),
        pytest.param(
            dump_layers([row()]).replace(",9,", ",many,"),
            "row 2, column 'macs': .* valid integer.* \\(found 'many'\\)",
            id="a word where a number belongs",
        ),
        pytest.param("node,colour\na,red\n", "row 2, column 'op': Field required", id="columns"),
    ],
)
def test_another_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "layers.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_layers(path)


def test_a_missing_or_binary_layers_csv(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file; `trtune compare` writes it"):
        read_layers(tmp_path / "layers.csv")
    (tmp_path / "layers.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_layers(tmp_path / "layers.csv")


def test_emulation_never_shows_a_latency(record: RunRecord) -> None:
    latencies = column(record, "latency (p95)")
    table = result_table(record)
    mark = table.marks[table.footnotes.index(EMULATED)]
    assert latencies[:3] == [f"—{mark}"] * 3
    assert latencies[3:6] == ["31.0 ms (33.4)²", "15.9 ms (17.4)²", "16.4 ms (17.8)²"]
    assert [text.rstrip(TIMES) for text in column(record, "speed-up")] == [
        "—", "—", "—", "—", "1.95", "1.89", "—",
    ]  # fmt: skip
    frame = result_frame(record)
    assert frame["latency_ms_median"].isna().tolist() == [True] * 3 + [False] * 3 + [True]
    assert frame["speedup"].isna().tolist() == [True] * 4 + [False] * 2 + [True]


def test_a_variant_that_could_not_run_gives_its_reason(record: RunRecord) -> None:
    table = result_table(record)
    assert column(record, "top-1")[-1] == "—³"
    assert table.footnotes[2] == "built, but there is no NVIDIA GPU here to run it"
    assert column(record, "not honoured") == ["—"] * 6 + ["1"]
    assert column(record, "layers")[:3] == ["82 FP32", "82 INT8", "80 INT8 + 2 FP32"]


def test_columns_nobody_has_a_value_for_are_left_out() -> None:
    record = RunRecord(
        schema=1,
        name="n",
        key="k",
        status="met",
        baseline=Baseline(metric="sqnr_db", value=None, samples=8),
        variants=[
            Variant(name="fp32", backend="x", value=None),
            Variant(name="int8", backend="x", value=17.25, sqnr_db=17.25, latency_note="no clock"),
        ],
    )
    table = result_table(record)
    assert table.columns == ("variant", "backend", "SQNR", "latency (p95)")
    assert table.rows == (("fp32", "x", "—", "—"), ("int8", "x", "17.2 dB", "—¹"))
    assert table.footnotes == ("no clock",)


def test_more_footnotes_than_superscripts() -> None:
    variants = [
        Variant(name="int8", backend=f"b{i}", value=None, reason=f"r{i}") for i in range(11)
    ]
    record = RunRecord(
        schema=1, name="n", key="k", status="failed", variants=variants,
        baseline=Baseline(metric="top1", value=None, samples=1),
    )  # fmt: skip
    assert column(record, "top-1")[8:] == ["—⁹", "—(10)", "—(11)"]
    assert result_table(record).marks[-1] == "(11)"


def test_the_frame_holds_plain_values(record: RunRecord) -> None:
    frame = result_frame(record).set_index(["backend", "variant"])
    tuned = frame.loc[("onnxruntime/deploy", "tuned")]
    assert (tuned["value"], tuned["nodes_int8"], tuned["pins"]) == (0.8485, 80, 2)
    assert tuned["speedup"] == pytest.approx(31.0 / 16.4)


def test_several_runs_stand_side_by_side(record: RunRecord) -> None:
    other = record.model_copy(update={"name": "other", "status": "missed", "target": {"min": 1}})
    table = compare_table([record, other])
    cells = [dict(zip(table.columns, r, strict=True)) for r in table.rows]
    assert [(c["run"], c["backend"]) for c in cells[2:5]] == [
        (record.name, "tensorrt"),
        ("other", "onnxruntime/emulate"),
        ("other", "onnxruntime/deploy"),
    ]
    assert (cells[0]["untuned"], cells[0]["tuned"]) == ("83.45 %", "84.85 %")
    assert (cells[0]["target"], cells[4]["target"]) == ("met", "missed")
    assert cells[0]["latency (p95)"] == "—¹"
    assert (cells[2]["tuned"], cells[2]["target"]) == ("—³", "—")


def test_worst_layers_come_first_and_ties_by_name() -> None:
    rows = [
        row("c", alone_sqnr_db=float("inf")),
        row("b", alone_sqnr_db=3.0),
        row("never measured"),
        row("a", alone_sqnr_db=3.0),
        row("broken", alone_sqnr_db=float("-inf")),
    ]
    worst = worst_layers(rows, by="alone_sqnr_db")
    assert [r.node for r in worst] == ["broken", "a", "b", "c"]
    assert [r.node for r in worst_layers(rows, by="alone_sqnr_db", count=1)] == ["broken"]


def test_pins_come_from_the_variant_and_from_the_origins(record: RunRecord) -> None:
    rows = [row("by the user", origin="user"), row("plain")]
    tuned = next(v for v in record.variants if v.name == "tuned")
    assert pinned_nodes(record, rows) == {*tuned.pinned, "by the user"}


def test_the_frame_of_layers_has_every_field(layers: list[LayerRow]) -> None:
    frame = layers_frame(layers)
    assert list(frame.columns) == list(LayerRow.model_fields)
    assert frame["node"].tolist() == [r.node for r in layers]
