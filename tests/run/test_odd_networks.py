"""Networks with what few have, each in a run of its own: names, sequences, shapes of the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
import tinyproject
from onnx import TensorProto, helper

from trtune.configs.errors import DataError
from trtune.reports.record import RunRecord
from trtune.run.pipeline import run
from trtune.tools import inspect

BOTH = tinyproject.BOTH


def ran(folder: Path, proto: onnx.ModelProto, *overrides: str) -> RunRecord:
    tinyproject.write_project(folder, tinymodels.conv_relu(), labels=False)
    for seed, name in enumerate(("calibration", "evaluation")):
        np.savez(folder / f"{name}.npz", **tinyproject.draw(proto, 12, seed=seed))
    onnx.save(proto, folder / "net.onnx")
    assert inspect(folder / "net.onnx").to_dict()
    return run(tinyproject.config_of(folder, *overrides), out=folder / "runs")


def looped() -> onnx.ModelProto:
    """A convolution in the body of a Loop, in which every node has one name."""
    nodes = [
        helper.make_node("Conv", ["s", "w"], ["t"], "same", pads=[1] * 4),
        helper.make_node("Relu", ["t"], ["next"], "same"),
        helper.make_node("Identity", ["go"], ["still"], "same"),
    ]
    shape = ["N", 8, 8, 8]
    body = helper.make_graph(
        nodes, "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, shape),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, shape),
        ],
    )  # fmt: skip
    net = tinymodels.Net()
    x = net.conv(net.input("x"), "before", 3, 8)
    net.weight("w", 8, 8, 3, 3)
    count, go = net.const("count", 2, np.int64), net.const("yes", True, np.bool_)
    net.op("Loop", count, go, x, out="looped", body=body)
    net.conv("looped", "y", 8, 4)
    return net.model({"y": ("N", 4, 8, 8)})


def sequenced() -> onnx.ModelProto:
    """Halves of a tensor as a sequence, one taken out of it, and both joined again."""
    net = tinymodels.Net()
    x = net.op("Relu", net.conv(net.input("x"), "a", 3, 16), out="r")
    net.op("SplitToSequence", x, net.const("sizes", [8, 8], np.int64), out="seq", axis=1)
    net.op("SequenceAt", "seq", net.const("one", 1, np.int64), out="second")
    net.op("ConcatFromSequence", "seq", out="joined", axis=1)
    net.conv("joined", "y", 16, 4)
    net.conv("second", "z", 8, 4)
    return net.model({"y": ("N", 4, 8, 8), "z": ("N", 4, 8, 8)})


def picked() -> onnx.ModelProto:
    """What lies above a threshold, beside the map that it is taken from."""
    net = tinymodels.Net()
    x = net.op("Relu", net.conv(net.input("x"), "a", 3, 16), out="r")
    y = net.conv(x, "map", 16, 8)
    above = net.op("Greater", y, net.const("threshold", 0.3), out="above")
    places = net.op("NonZero", above, out="places")
    rows = net.op("Transpose", places, out="rows", perm=[1, 0])
    net.op("GatherND", y, rows, out="found")
    return net.model({"found": ("K",), "map": ("N", 8, 8, 8)})


@pytest.mark.parametrize(("make", "int8"), [(looped, 2), (sequenced, 3), (picked, 2)])
def test_it_runs_in_int8(make: object, int8: int, tmp_path: Path) -> None:
    assert callable(make)
    record = ran(tmp_path, make(), BOTH, "calibration.method=auto")
    assert record.status == "met"
    tuned = [one for one in record.variants if one.name == "tuned"]
    assert [one.nodes["int8"] for one in tuned] == [int8, int8]


def test_shapes_that_follow_the_data_print_no_errors(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ran(tmp_path, picked()).status == "met"
    assert "Non-zero status code" not in capfd.readouterr().err


def test_a_run_in_which_nothing_was_compared_says_so(tmp_path: Path) -> None:
    """Features first: that 16 rows are no batch of 16 nothing but the user can tell."""
    net = tinymodels.Net()
    x = net.input("x", (16, "N"))
    x = net.op("Gemm", x, net.weight("w", 16, 8), out="g", transA=1)
    net.op("Gemm", net.op("Relu", x, out="r"), net.weight("v", 8, 4), out="y")
    proto = net.model({"y": ("N", 4)})
    tinyproject.write_project(tmp_path, tinymodels.conv_relu(), labels=False)
    for seed, name in enumerate(("calibration", "evaluation")):
        rows = np.random.default_rng(seed).standard_normal((16, 12))
        np.savez(tmp_path / f"{name}.npz", x=rows.astype(np.float32))
    onnx.save(proto, tmp_path / "net.onnx")
    record = run(tinyproject.config_of(tmp_path), out=tmp_path / "runs")
    assert record.status == "missed"
    assert any(note.startswith("nothing was compared") for note in record.notes)
    said = tinyproject.config_of(tmp_path, "data.calibration.axis={x: 1}", "name=said")
    record = run(said, out=tmp_path / "runs")
    assert record.status == "met"


def labelled() -> onnx.ModelProto:
    """Names of classes beside their scores."""
    net = tinymodels.Net()
    x = net.linear(net.input("x", ("N", 16)), "scores", 16, 4)
    best = net.op("ArgMax", x, out="best", axis=1, keepdims=0)
    names = helper.make_tensor("names", TensorProto.STRING, [4], [b"a", b"b", b"c", b"d"])
    net.initializers.append(names)
    net.op("Gather", "names", best, out="label")
    return net.model({"label": (("N",), TensorProto.STRING), "scores": ("N", 4)})


def broken_weight() -> onnx.ModelProto:
    """One weight is infinite, and a Clip behind it hides that."""
    net = tinymodels.Net()
    w = np.random.default_rng(0).normal(size=(16, 3, 3, 3))
    w[0, 0, 0, 0] = np.inf
    x = net.op("Conv", net.input("x"), net.const("w", w), out="c", pads=[1] * 4)
    x = net.op("Clip", x, net.const("low", -6.0), net.const("high", 6.0), out="clipped")
    return net.model({net.conv(x, "y", 16, 8): ("N", 8, 8, 8)})


def loud() -> onnx.ModelProto:
    """Values whose squares float32 does not hold."""
    net = tinymodels.Net()
    x = net.op("Mul", net.input("x"), net.const("huge", 1e20), out="loud")
    w = np.random.default_rng(0).normal(size=(16, 3, 3, 3)) * 1e-18
    x = net.op("Conv", x, net.const("w", w), out="c", pads=[1] * 4)
    x = net.op("Mul", x, net.const("tiny", 1e-3), out="usual")
    return net.model({net.conv(x, "y", 16, 8): ("N", 8, 8, 8)})


@pytest.mark.parametrize(
    ("make", "int8", "note"),
    [
        (labelled, 1, ""),
        (broken_weight, 1, "n_c stays fp32: its weights have NaN or infinite values"),
        pytest.param(loud, 2, "", marks=pytest.mark.slow),
    ],
)
def test_texts_and_values_without_end_are_no_bug(
    make: object, int8: int, note: str, tmp_path: Path
) -> None:
    assert callable(make)
    record = ran(tmp_path, make(), "calibration.method=auto", "calibration.prepare=auto")
    assert record.status == "met"
    assert next(one for one in record.variants if one.name == "tuned").nodes["int8"] == int8
    assert not note or note in record.notes


def test_rows_for_an_input_that_takes_one_are_refused(tmp_path: Path) -> None:
    net = tinymodels.Net()
    k = net.linear(net.input("style", (1, 8)), "l", 8, 16 * 27)
    k = net.op("Reshape", k, net.const("shape", [16, 3, 3, 3], np.int64), out="kernel")
    x = net.op("Relu", net.op("Conv", net.input("x"), k, out="c", pads=[1] * 4), out="r")
    proto = net.model({net.conv(x, "y", 16, 8): ("N", 8, 8, 8)})
    with pytest.raises(DataError, match=r"'style' takes exactly \[1, 8\], and its array is \[12"):
        ran(tmp_path, proto)
