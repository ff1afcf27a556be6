from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import tinymodels
from onnx import helper

from trtune.precision.backends.ort.profile import (
    FIRST,
    conversion_seconds,
    kernel_seconds,
    owner_of,
    owners_in,
    profiled_times,
)

NAMES = {"conv_1": "conv_1", "conv_1_out": "conv_1", "mul_3": "mul_3", "mul_31": "mul_31"}


@pytest.mark.parametrize(
    ("name", "output", "owner"),
    [
        pytest.param("conv_1", "x", "conv_1", id="its own name"),
        pytest.param("fused 7", "conv_1_out", "conv_1", id="what it makes"),
        pytest.param("conv_1_out_nchwc", "reorder_0", "conv_1", id="a layout's suffix"),
        pytest.param("mul_3/QuickGeluFusion/", "reorder_1", "mul_3", id="a fusion's suffix"),
        pytest.param("mul_31_token_5", "t", "mul_31", id="not the shorter name"),
        pytest.param("mul_312", "t", "", id="a name goes on only where a word ends"),
        pytest.param("Transpose", "Transpose_0", "", id="onnxruntime's own"),
    ],
)
def test_a_kernel_belongs_to_the_node_that_it_is_named_after(
    name: str, output: str, owner: str
) -> None:
    assert owner_of(helper.make_node("X", ["a"], [output], name=name), NAMES) == owner


def test_the_time_of_a_kernel_is_the_least_after_the_first_runs() -> None:
    def event(name: str, microseconds: int, kind: str = "Node") -> dict[str, Any]:
        return {"cat": kind, "name": name, "dur": microseconds}

    slow = [event("a_kernel_time", 1)] * FIRST
    later = [event("a_kernel_time", us) for us in (9, 7, 8)]
    others = [event("a_fence_before", 3), event("model_run", 99, "Session")]
    assert kernel_seconds([*slow, *later, *others]) == {"a": pytest.approx(7e-6)}
    assert kernel_seconds([event("b_kernel_time", 4)]) == {"b": pytest.approx(4e-6)}


def test_every_product_of_a_real_model_has_its_time(tmp_path: Path) -> None:
    proto = tinymodels.residual()
    path = tmp_path / "net.onnx"
    onnx.save(proto, path)
    feeds = tinymodels.feeds(proto)
    names = owners_in(proto.graph)
    for model in (path, proto):
        found = profiled_times(model, names, feeds, threads=1)
        convs = [node for node in proto.graph.node if node.op_type == "Conv"]
        readers = {name: node.name for node in proto.graph.node for name in node.input}
        assert set(found) <= {node.name for node in proto.graph.node}
        for conv in convs:  # a fused activation gives the kernel its name
            assert {conv.name, readers[conv.output[0]]} & set(found)
        assert all(seconds >= 0 for seconds in found.values())


def test_conversions_take_some_time() -> None:
    assert min(conversion_seconds(1)) > 0
