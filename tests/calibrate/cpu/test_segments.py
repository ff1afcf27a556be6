from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tinymodels
from hypothesis import given
from hypothesis import strategies as st

from trtune.calibrate.cpu.segments import cut, holds_graphs, pack

CUT = ("conv_relu", "residual", "concat", "silu_se", "attention", "dynamic_reshape", "two_inputs")


def outputs_of(model: onnx.ModelProto) -> list[str]:
    return [name for node in model.graph.node for name in node.output]


def typed(piece: onnx.ModelProto, values: dict[str, Any]) -> onnx.ModelProto:
    """`piece` with the types that its inputs have in `values`."""
    for info in piece.graph.input:
        if not info.HasField("type"):
            element = onnx.helper.np_dtype_to_tensor_dtype(values[info.name].dtype)
            info.type.CopyFrom(onnx.helper.make_tensor_type_proto(element, None))
    return piece


def run_pieces(pieces: list[onnx.ModelProto], feeds: dict[str, Any]) -> dict[str, Any]:
    values = dict(feeds)
    for piece in pieces:
        session = ort.InferenceSession(
            typed(piece, values).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        given_ = {i.name: values[i.name] for i in session.get_inputs()}
        values.update(zip(names, session.run(names, given_), strict=True))
    return values


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_pieces_run_one_after_the_other_give_what_the_model_gives(name: str, limit: int) -> None:
    model = tinymodels.MODELS[name]()
    tensors = outputs_of(model)
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in tensors)
    feeds = tinymodels.feeds(model)
    expected = tinymodels.run(whole, feeds)
    pieces = cut(model, tensors, dict.fromkeys(tensors, 1), limit)
    assert len(pieces) == -(-len(model.graph.node) // limit)
    found = run_pieces(pieces, feeds)
    for tensor in tensors:
        np.testing.assert_allclose(found[tensor], expected[tensor], rtol=1e-4, atol=1e-6)


def test_what_no_tapped_tensor_depends_on_is_left_out() -> None:
    model = tinymodels.conv_relu()
    (piece,) = cut(model, ["relu1"], {}, 100)
    assert [node.output[0] for node in piece.graph.node] == ["conv1", "relu1"]
    assert [tensor.name for tensor in piece.graph.initializer] == ["conv1_w", "conv1_b"]
    assert [info.name for info in piece.graph.output] == ["relu1"]


def test_a_piece_hands_on_what_later_pieces_need() -> None:
    model = tinymodels.residual()
    first, second = cut(model, ["relu1", "sum"], {"relu1": 10, "sum": 10}, 10)
    assert {info.name for info in first.graph.output} == {"stem_relu", "relu1"}
    assert {info.name for info in second.graph.input} == {"stem_relu", "relu1"}
    assert [info.name for info in second.graph.output] == ["sum"]


def test_the_model_is_not_touched() -> None:
    model = tinymodels.residual()
    before = model.SerializeToString()
    cut(model, outputs_of(model), {}, 1)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("name", "tapped"),
    [
        pytest.param("branches", "chosen", id="a node holds graphs"),
        pytest.param("conv_relu", "conv1_w", id="a weight is tapped"),
        pytest.param("conv_relu", "nowhere", id="no node makes the tensor"),
    ],
)
def test_graphs_that_cannot_be_cut(name: str, tapped: str) -> None:
    assert cut(tinymodels.MODELS[name](), [tapped], {}, 1) == []


def test_which_models_hold_graphs() -> None:
    assert holds_graphs(tinymodels.branches().graph)
    assert not holds_graphs(tinymodels.conv_relu().graph)


BUFFERS = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12
)


@given(BUFFERS)
def test_buffers_alive_at_the_same_time_never_overlap(
    buffers: list[tuple[int, int, int]],
) -> None:
    sizes = {str(i): size for i, (size, _, _) in enumerate(buffers)}
    lives = {str(i): (min(a, b), max(a, b)) for i, (_, a, b) in enumerate(buffers)}
    offsets, end = pack(sizes, lives)
    spans = {n: (offsets[n], offsets[n] + sizes[n]) for n in sizes}
    assert end == max(stop for _, stop in spans.values())
    busiest = max(sum(sizes[n] for n in sizes if lives[n][0] <= t <= lives[n][1]) for t in range(7))
    assert busiest <= end <= sum(sizes.values())
    for a in sizes:
        for b in sizes:
            together = lives[a][0] <= lives[b][1] and lives[b][0] <= lives[a][1]
            if a < b and together and sizes[a] and sizes[b]:
                assert spans[a][1] <= spans[b][0] or spans[b][1] <= spans[a][0]
