"""Sums and products of elements that a model quantizes itself: planned, pinned, tuned, built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
from rtxparts import needs_rtx
from tinyqat import QatNet, assert_same_bits, channel_scales, imported
from tinyquant import outputs

from trtune.calibrate.table import CalibrationTable
from trtune.datasets.batches import Batch
from trtune.precision.backends.ort.backend import Lowering, OnnxruntimeBackend
from trtune.precision.backends.rtx.as_it_is import build_as_it_is
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.compare.alone import Alone, alone_errors
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.deploy import lower_deploy
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.fusion import fusion_groups
from trtune.precision.plan.imported import ImportedPlan
from trtune.precision.plan.placement import place
from trtune.precision.quantized.against import against_builder
from trtune.precision.quantized.importing import (
    Imported,
    insert_file,
    insert_quantization,
    lint_model,
    load_quantized,
    strip_file,
)
from trtune.precision.quantized.insert import led_by
from trtune.precision.runtime.api import Candidate
from trtune.precision.tune.leave_one_out import LeaveOneOut, Quantizing, Reference
from trtune.reports.entries.pins import pin_costs


def begun() -> tuple[QatNet, str]:
    """A convolution with a Relu, quantized."""
    net = QatNet()
    x = net.qconv(net.pair(net.input("input"), 0.03), "stem", 3, 16)
    return net, net.pair(net.op("Relu", x, out="stem_relu"), 0.02)


def ended(net: QatNet, x: str, scale: float = 0.03) -> onnx.ModelProto:
    return net.head(net.qconv(net.pair(x, scale), "last", 16, 16), 16)


def two_branches(op: str = "Add", *, both: bool = True) -> onnx.ModelProto:
    """Two convolutions that meet in `op`, with a pair on each side."""
    net, x = begun()
    left = net.pair(net.qconv(x, "left", 16, 16), 0.02)
    right = net.qconv(x, "right", 16, 16)
    y = net.op(op, left, net.pair(right, 0.025) if both else right, out="met")
    return ended(net, net.op("Relu", y, out="met_relu"))


def skip() -> onnx.ModelProto:
    """A residual Add whose skip and main input both carry a pair."""
    net, x = begun()
    y = net.op("Add", net.pair(net.qconv(x, "conv", 16, 16), 0.02), x, out="met")
    return ended(net, net.op("Relu", y, out="met_relu"))


def gate() -> onnx.ModelProto:
    """Squeeze and excite: one factor is averaged too, the other is one value a channel."""
    net, x = begun()
    g = net.pair(net.op("GlobalAveragePool", x, out="mean"), 0.01)
    g = net.pair(net.op("Relu", net.qconv(g, "down", 16, 16, 1), out="down_relu"), 0.01)
    g = net.pair(net.op("Sigmoid", net.qconv(g, "up", 16, 16, 1), out="gate"), 1 / 127)
    return ended(net, net.op("Mul", x, g, out="met"))


def silu() -> onnx.ModelProto:
    """x * sigmoid(x), every tensor of it quantized."""
    net = QatNet()
    x = net.pair(net.qconv(net.pair(net.input("input"), 0.03), "stem", 3, 16), 0.05)
    return ended(net, net.op("Mul", x, net.pair(net.op("Sigmoid", x, out="s"), 1 / 127), out="met"))


def moved() -> onnx.ModelProto:
    """Pairs in front of a Transpose and a Reshape, whose results meet."""
    net = QatNet()
    x = net.pair(net.input("input", (2, 6, 16)), 0.03)
    sides = []
    for name in ("left", "right"):
        weight = net.weight(f"{name}_w", 16, 16)
        read = net.pair(weight, channel_scales(net.value(weight), 1), axis=1)
        sides.append(net.pair(net.op("MatMul", x, read, out=name), 0.02))
    turned = net.op("Transpose", sides[0], out="turned", perm=[0, 2, 1])
    shape = net.const("shape", np.array([2, 16, 6]), np.int64)
    net.op("Add", turned, net.op("Reshape", sides[1], shape, out="shaped"), out="output")
    proto = net.model({"output": (2, 16, 6)})
    proto.graph.node[-1].name = "n_met"
    return proto


def alone() -> onnx.ModelProto:
    """Two inputs of the model added, and nothing else."""
    net = QatNet()
    x, y = net.pair(net.input("input"), 0.03), net.pair(net.input("second"), 0.02)
    net.pair(net.op("Add", x, y, out="met"), 0.05, out="output")
    return net.model({"output": ("N", 3, 8, 8)})


MAKERS: dict[str, Callable[[], onnx.ModelProto]] = {
    made.__name__: made for made in (two_branches, skip, gate, silu, moved, alone)
}


def candidate(found: Imported) -> Candidate:
    return Candidate(found.model, found.plan, found.table)


def with_every_scale(found: Imported) -> CalibrationTable:
    """The table with a scale for every tensor, as a run measures what is missing."""
    tensors = (t for node in found.model.proto.graph.node for t in node.output)
    scales = {**dict.fromkeys(tensors, 0.05), **found.table.scales}
    return replace(found.table, scales=scales)


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_planned_as_the_file_says_and_comes_back_bit_for_bit(name: str) -> None:
    proto = MAKERS[name]()
    found = imported(proto)
    assert found.plan.elementwise == ("n_met",)
    assert found.plan.is_int8("n_met")
    assert found.plan.leader("n_met") == "n_met"
    again = insert_quantization(found.model, found.table, found.plan)
    assert_same_bits(proto, again, tinymodels.feeds(found.model.proto, batch=2))
    assert ImportedPlan.from_json(found.plan.to_json()) == found.plan


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Max", "Min", "Sum"])
def test_every_operator_on_elements(op: str) -> None:
    assert imported(two_branches(op)).plan.is_int8("n_met")


@pytest.mark.parametrize("name", MAKERS)
def test_a_pin_takes_its_own_pairs_away(name: str) -> None:
    free, pinned = imported(MAKERS[name]()), imported(MAKERS[name](), pins={"n_met": "fp32"})
    gone = {*free.plan.active_reads} - {*pinned.plan.active_reads}
    assert {read.owners for read in gone} == {("n_met",)}
    assert len(gone) == 2
    left = {*free.plan.int8_nodes} - {*pinned.plan.int8_nodes}
    assert left == {"n_met"}


def test_pinning_a_neighbour_leaves_its_pairs() -> None:
    found = imported(two_branches(), pins={"n_right": "fp32"})
    assert {read.index for read in found.plan.active_reads if read.node == "n_met"} == {0, 1}


def test_one_quantized_side_is_the_skip_of_the_convolution() -> None:
    found = imported(two_branches(both=False))
    assert found.plan.elementwise == ()
    assert found.plan.leader("n_met") == "n_right"


def test_sides_of_two_scales_are_not_enough() -> None:
    net, x = begun()
    joined = net.op("Concat", net.pair(x, 0.05, out="again"), x, out="joined", axis=1)
    other = net.pair(net.qconv(x, "conv", 16, 32), 0.02)
    y = net.op("Add", joined, other, out="met")
    proto = net.head(net.qconv(net.pair(y, 0.03), "last", 32, 16), 16)
    assert imported(proto).plan.elementwise == ()


def test_a_constant_is_no_data() -> None:
    net, x = begun()
    half = net.pair(net.const("half", np.full((1, 16, 1, 1), 0.5)), 0.5 / 127)
    assert imported(ended(net, net.op("Mul", x, half, out="met"))).plan.elementwise == ()


@pytest.mark.parametrize("name", MAKERS)
def test_by_the_rules_it_follows_what_surrounds_it(name: str) -> None:
    """As onnxruntime's own kernels want it: the groups of the float network."""
    found = imported(MAKERS[name]())
    ruled = found.plan.by_rules()
    assert dict(ruled.groups) == fusion_groups(GraphView.of(found.model))
    assert (ruled.nodes["n_met"].role, ruled.precision("n_met")) == ("follows", "fp32")
    lower_deploy(found.model, found.plan, with_every_scale(found))


def test_groups_are_cut_in_front_of_it() -> None:
    assert led_by({"a": ("b", "add", "relu"), "c": ("d",)}, ["add"]) == {
        "a": ("b",),
        "add": ("relu",),
        "c": ("d",),
    }


@pytest.mark.parametrize("name", ["two_branches", "gate", "silu"])
def test_what_the_tuner_gains_is_the_model_lowered_again(name: str) -> None:
    found = imported(MAKERS[name]())
    names = tuple("abcd")
    pictures = [
        Batch(tinymodels.feeds(found.model.proto, batch=4, seed=seed), names) for seed in range(2)
    ]
    reference = Reference.of(found.model, pictures)
    quantizing = Quantizing.of(found.model, found.table)
    plan = found.plan.pin(["n_met"], "fp32", "pinned")
    proto = lower_emulate(found.model, plan, found.table)
    expected = reference.noise(lambda b: outputs(proto, dict(reference.pictures[b].feeds)))
    noise = LeaveOneOut(quantizing, found.plan, reference).without("n_met")
    assert noise == pytest.approx(expected, rel=1e-2, abs=1e-9)


def test_its_error_alone_is_measured() -> None:
    found = imported(gate())
    view = GraphView.of(found.model)
    feeds = tinymodels.feeds(found.model.proto, batch=4)
    within = Alone(found.model, view, place(view, found.plan), [Batch(dict(feeds), tuple("abcd"))])
    errors = alone_errors(within, view, found.plan, found.table, nodes=["n_met"])
    assert np.isfinite(errors["n_met"].noise)
    assert errors["n_met"].noise > 0


@pytest.mark.parametrize("name", MAKERS)
def test_strip_and_insert_keep_it(name: str, tmp_path: Path) -> None:
    proto = MAKERS[name]()
    onnx.save(proto, tmp_path / "qat.onnx")
    strip_file(tmp_path / "qat.onnx", tmp_path / "fp32.onnx", tmp_path / "q.cache")
    insert_file(tmp_path / "fp32.onnx", tmp_path / "q.cache", tmp_path / "again.onnx")
    again = onnx.load(tmp_path / "again.onnx")
    assert_same_bits(proto, again, tinymodels.feeds(proto, batch=2))


def test_ranges_made_symmetric_are_left_out_there_and_kept_where_they_are_exact() -> None:
    """Rounding to half as many levels for an Add that has no integer arithmetic loses and gains
    nothing: the skip of a convolution alone is kept."""

    def of(dtype: type, zero: int) -> Imported:
        net, x = begun()
        left = net.pair(net.qconv(x, "left", 16, 16), 0.02, zero, dtype)
        y = net.op("Add", left, net.pair(net.qconv(x, "right", 16, 16), 0.025), out="met")
        y = net.pair(net.op("Relu", y, out="met_relu"), 0.03, 0, np.uint8)
        return imported(net.head(net.qconv(y, "last", 16, 16), 16), allow_requantize=True)

    assert of(np.int8, 0).plan.elementwise == ("n_met",)
    asymmetric = of(np.uint8, 117)
    assert asymmetric.plan.elementwise == ()
    assert "spare-pair" in {row.kind for row in asymmetric.findings}


BUILT = {"two_branches": "int8", "skip": "int8", "gate": "fp32", "silu": "int8", "moved": "int8",
         "alone": "unknown"}  # fmt: skip
"""What TensorRT-RTX was seen to do: the gate's factor is dequantized by the kernel that averages
it and written as floats, and an Add alone reads and writes floats."""


@needs_rtx
@pytest.mark.parametrize("name", BUILT)
def test_the_compiler_is_asked_what_became_of_it(name: str, tmp_path: Path) -> None:
    found = imported(MAKERS[name]())
    info = RtxBackend(compute_capabilities=["8.9"]).build(candidate(found), tmp_path)
    assert info.precisions["n_met"] == BUILT[name]
    told = [words for words in info.not_honoured if words.startswith("n_met: planned int8")]
    assert len(told) == (BUILT[name] != "int8")


@needs_rtx
@pytest.mark.parametrize("name", ["two_branches", "gate"])
def test_it_stands_in_the_linters_table(name: str, tmp_path: Path) -> None:
    path = tmp_path / "qat.onnx"
    onnx.save(MAKERS[name](), path)
    original, _ = load_quantized(path)
    built = build_as_it_is(original, tmp_path)
    precisions = {node: account.precision for node, account in built.accounts.items()}
    seen = against_builder(original, lint_model(path), refused=built.refused, precisions=precisions)
    assert seen.of("n_met") == BUILT[name]
    assert seen.disagreements == ()


@pytest.mark.parametrize("lowering", ["emulate", "deploy"])
def test_onnxruntime_keeps_it(lowering: Lowering, tmp_path: Path) -> None:
    found = imported(two_branches())
    asked = Candidate(found.model, found.plan, with_every_scale(found))
    info = OnnxruntimeBackend(lowering).build(asked, tmp_path)
    assert info.precisions["n_met"] == "int8"


def test_what_its_pin_costs() -> None:
    found = imported(two_branches(), pins={"n_met": "fp32", "n_left": "fp16"})
    costs = {row.node: row.cost for row in pin_costs(GraphView.of(found.model), found.plan)}
    assert costs["n_met"] == "moves four times the bytes of INT8"
    assert costs["n_left"] == "multiplies at half the rate of INT8"
