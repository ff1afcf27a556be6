"""Times of layers become times of nodes, and nothing is counted twice or lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtune.precision.backends.trt.inspector import EngineLayer
from trtune.precision.backends.trt.layer_times import node_times

NODES = ["conv1", "relu1", "conv2", "head"]


def layer(name: str, *nodes: str) -> EngineLayer:
    return EngineLayer(name, "Convolution", "int8", nodes)


@pytest.mark.parametrize(
    ("times", "layers", "expected"),
    [
        pytest.param({}, [], ({}, 0.0), id="nothing measured"),
        pytest.param(
            {"conv1 + relu1": 0.5}, [layer("conv1 + relu1", "relu1", "conv1")],
            ({"conv1": 0.5}, 0.0), id="a fused layer counts for its first node",
        ),
        pytest.param(
            {"k1": 0.25, "k2": 0.5}, [layer("k1", "conv2"), layer("k2", "conv2")],
            ({"conv2": 0.75}, 0.0), id="two layers of one node add up",
        ),
        pytest.param(
            {"head": 1.0, "conv1": 2.0}, [layer("head", "head"), layer("conv1", "conv1")],
            ({"conv1": 2.0, "head": 1.0}, 0.0), id="in the order of the model",
        ),
        pytest.param(
            {"Reformatting CopyNode": 0.1, "other": 0.2}, [layer("other", "unknown")],
            ({}, 0.3), id="what is no node's is apart",
        ),
    ],
)  # fmt: skip
def test_node_times(
    times: dict[str, float], layers: list[EngineLayer], expected: tuple[dict[str, float], float]
) -> None:
    assert node_times(times, layers, NODES) == expected


@given(st.lists(st.tuples(st.sets(st.sampled_from(NODES)), st.integers(0, 10**6)), max_size=8))
def test_the_values_add_up_to_what_the_engine_took(parts: list[tuple[set[str], int]]) -> None:
    layers = [layer(f"l{i}", *nodes) for i, (nodes, _) in enumerate(parts)]
    times = {f"l{i}": micro / 1000 for i, (_, micro) in enumerate(parts)}
    found, rest = node_times(times, layers, NODES)
    assert sum(found.values()) + rest == pytest.approx(sum(times.values()), abs=1e-5)
