"""Values of chosen outputs of an onnxruntime session."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tinymodels

from trtune.precision.runtime.session import SharedWeights, make_session, named_values


@pytest.mark.parametrize("names", [[], ["y"], ["relu", "y"]])
def test_only_what_is_named_is_given(names: list[str]) -> None:
    net = tinymodels.Net()
    x = net.op("Relu", net.input("x"), out="relu")
    proto = net.model({net.op("Neg", x, out="y"): tinymodels.PICTURE})
    session = make_session(proto, outputs=["relu"])
    rows = np.full((2, 3, 8, 8), 1.5, np.float32)
    found = named_values(session, names, {"x": rows})
    assert {name: float(value.mean()) for name, value in found.items()} == {
        name: {"relu": 1.5, "y": -1.5}[name] for name in names
    }


def test_parts_of_a_graph_share_its_large_constants() -> None:
    weights = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) / 4096
    small = np.ones(64, np.float32)
    held = [onnx.numpy_helper.from_array(a, n) for n, a in (("w", weights), ("b", small))]
    shared = SharedWeights(held)
    assert list(shared.values) == ["w"]
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])],
        "part",
        [helper.make_tensor_value_info("x", kind, [None, 64])],
        [helper.make_tensor_value_info("y", kind, [None, 64])],
        [shared.light(tensor) for tensor in held],
    )
    part = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert part.ByteSize() < 1000
    x = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    for _ in range(2):
        session = make_session(part, weights=shared.read_by(part))
        np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weights + small, rtol=1e-5)
