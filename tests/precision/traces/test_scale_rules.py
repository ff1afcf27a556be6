"""Scales that follow from others, without data."""

from __future__ import annotations

import numpy as np
import pytest
import realdata
import tinymodels

from trtune.precision.graph.file import model_from_proto
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.rules import make_plan
from trtune.precision.quantized.importing import import_quantized
from trtune.precision.quantized.migrate import to_cache
from trtune.precision.traces.scale_rules import complete_scales


def test_what_follows_from_the_pairs_of_a_chain() -> None:
    view = GraphView.of(model_from_proto(tinymodels.conv_relu()))
    found, left = complete_scales(
        view, make_plan(view), {"input": 0.01, "relu1": 0.02, "flat": 0.03}
    )
    assert (found["input"], found["relu1"], found["flat"]) == (0.01, 0.02, 0.03)
    assert found["conv1"] == 0.02  # fused with what has a scale
    assert found["pooled"] == 0.03  # moved
    gemm = next(node for node in view.nodes if node.op_type == "Gemm")
    weights = np.abs(view.constant(gemm.input[1]))
    largest = max(weights.sum(axis=0).max(), weights.sum(axis=1).max())
    assert 0 < found["logits"] <= 0.03 * largest * 1.0001
    assert left == ("conv2", "relu2")


@realdata.needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scales", "complete", "left"),
    [
        ("mobilenetv2_cifar10_qat", 53, 101, []),
        ("mobilenetv2_imagenet_qat_uint8", 65, 130, []),
        ("resnet20_cifar10_qat", 22, 47, ["/l/l.8/c2/Conv"]),
    ],
)
def test_caches_of_quantized_models(name: str, scales: int, complete: int, left: list[str]) -> None:
    path = realdata.data_dir() / "models" / f"{name}.onnx"
    found = import_quantized(path, allow_requantize=True)
    view = GraphView.of(found.model)
    cache, still = to_cache(view, found.table)
    assert len(found.table.scales) == scales
    tensors = [t for t in cache.scales if t in view.producer or t in view.graph_inputs]
    assert len(tensors) == complete
    assert list(still) == left
    assert {t: cache.scales[t] for t in found.table.scales} == dict(found.table.scales)
