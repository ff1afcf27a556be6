"""Verdicts of several backends, in words and in the side-by-side table."""

from __future__ import annotations

from trtune.reports.record import Baseline, RunRecord, Variant
from trtune.reports.summary import verdict
from trtune.reports.tables import compare_table, result_table

EMULATE, DEPLOY = "onnxruntime/emulate", "onnxruntime/deploy"


def a_record(*, within_noise: bool = False) -> RunRecord:
    """20.5 dB are asked for; one backend has them, the other misses by what rounding hides."""
    return RunRecord(
        schema=1,
        name="r",
        key="k",
        status="missed",
        target={"metric": "sqnr_db", "min": 20.5},
        baseline=Baseline(metric="sqnr_db", value=None, samples=744),
        variants=[
            Variant(name="tuned", backend=EMULATE, value=21.0, verdict="met", samples=744),
            Variant(name="tuned", backend=DEPLOY, value=20.46, verdict="missed", samples=744,
                    interval=(20.3, 20.62), within_noise=within_noise, size_bytes=5),
            Variant(name="tuned", backend="tensorrt_rtx", value=None, pinned=["a"], size_bytes=7),
        ],
    )  # fmt: skip


def test_it_says_which_backend_misses_and_by_how_much() -> None:
    assert verdict(a_record()) == (
        "The target, SQNR of at least 20.5 dB, is missed. It is met on onnxruntime/emulate; "
        "onnxruntime/deploy has 20.46 dB."
    )


def test_it_says_that_the_pictures_cannot_tell() -> None:
    assert "within the noise of 744 pictures (20.3 to 20.6 dB with 95 % confidence on " in verdict(
        a_record(within_noise=True)
    )


def test_every_row_has_its_own_verdict() -> None:
    table = result_table(a_record(within_noise=True))
    column = table.columns.index("target")
    assert [row[column] for row in table.rows] == ["met", "missed, within noise", "—"]
    side = compare_table([a_record()])
    at = {name: side.columns.index(name) for name in ("backend", "target", "pins", "size")}
    found = {row[at["backend"]]: tuple(row[at[n]] for n in ("target", "pins", "size"))
             for row in side.rows}  # fmt: skip
    assert found[EMULATE][0] == "met"
    assert found[DEPLOY][0] == "missed"
    assert found["tensorrt_rtx"][1:] == ("1", "7 B")
