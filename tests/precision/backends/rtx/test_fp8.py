"""FP8 in TensorRT-RTX's own account: alone, beside INT8 and FP16, and where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import tinymodels
from realdata import data_dir, needs_data
from rtxparts import needs_rtx

from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import ConfigError
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.backends.rtx.log import Account, Kernel, Operand, accounts, complaints
from trtune.precision.graph.view import GraphView, Model, load_model, model_from_proto
from trtune.precision.plan.placement import place
from trtune.precision.plan.plan import TUNER, PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.api import Candidate

SHARED = (
    *("resnet20_cifar10", "mobilenetv2_cifar10", "efficientnet_b0_cifar10", "vit_cifar10"),
    *("mobilenetv2_imagenet", "squeezenet1.1_imagenet", "yolox_nano_coco"),
)


def candidate_of(model: Model, plan: PrecisionPlan) -> Candidate:
    view = GraphView.of(model)
    table = CalibrationTable({t: 0.05 for t in place(view, make_plan(view)).activations})
    return Candidate(model, plan, table)


def named(name: str, pins: Mapping[str, str], fallback: str = "fp32") -> Candidate:
    model = model_from_proto(tinymodels.MODELS[name]())
    view = GraphView.of(model)
    return candidate_of(model, make_plan(view, pins=pins, fallback=fallback))


def kernel(data: str, weights: str, kind: str = "correlation") -> Kernel:
    return Kernel(
        "k", kind, (Operand("x", (1, 16, 8, 8), data),), (Operand("w", (16, 16, 3, 3), weights),),
        (Operand("y", (1, 16, 8, 8), "Float"),), ("n",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "weights", "expected"),
    [
        ("FP8", "FP8", "fp8"),
        ("Int8", "Int8", "int8"),
        ("FP8", "Half", "fp16"),  # cast and multiplied in the weights' type
        ("Int8", "Float", "fp32"),
        ("FP8", "Int8", "unknown"),
    ],
)
def test_a_kernel_computes_in_what_both_factors_are(data: str, weights: str, expected: str) -> None:
    found = kernel(data, weights)
    assert found.precision == expected
    assert accounts([found], ["n"], compute={"n"})["n"].precision == expected


def test_what_came_out_in_another_type_is_said() -> None:
    candidate = named("conv_relu", {"n_conv2": "fp8"})
    found = {name: Account("int8") for name in candidate.plan.nodes}
    said = complaints(candidate.plan, found, {})
    assert len(said) == 1
    assert said[0].startswith("n_conv2: planned fp8, runs in int8")
    unknown = {**found, "n_conv2": Account("unknown")}
    assert complaints(candidate.plan, unknown, {})[0].startswith(
        "n_conv2: planned fp8, what it runs in is unknown"
    )


@needs_rtx
@pytest.mark.parametrize("capability", ["8.9", "12.0"])
@pytest.mark.parametrize(
    ("name", "pins", "fallback"),
    [
        pytest.param("residual", {"n_conv1": "fp8", "n_conv2": "fp8"}, "fp32", id="with a skip"),
        pytest.param("concat", {"n_left": "fp8", "n_mix": "fp16"}, "fp16", id="three at a time"),
    ],
)
def test_what_is_planned_is_what_is_built(
    name: str, pins: dict[str, str], fallback: str, capability: str, tmp_path: Path
) -> None:
    candidate = named(name, pins, fallback)
    info = RtxBackend(compute_capabilities=[capability]).build(candidate, tmp_path)
    assert info.not_honoured == ()
    plan = candidate.plan
    assert all(info.precisions[node] == plan.precision(node) for node in plan.compute_nodes)
    assert plan.fp8_nodes


@needs_rtx
@pytest.mark.parametrize("targets", [["8.6"], ["8.9", "8.0"]])
def test_a_gpu_without_fp8_is_refused_by_name(targets: list[str], tmp_path: Path) -> None:
    candidate = named("conv_relu", {"n_conv2": "fp8"})
    lacking = next(target for target in targets if target < "8.9")
    with pytest.raises(ConfigError, match=f"GPUs of {lacking} have no FP8"):
        RtxBackend(compute_capabilities=targets).build(candidate, tmp_path)


@needs_rtx
@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["8.9", "12.0"])
@pytest.mark.parametrize("name", SHARED)
def test_real_models_mix_three_precisions(name: str, capability: str, tmp_path: Path) -> None:
    model = load_model(data_dir() / "models" / f"{name}.onnx")
    plan = make_plan(GraphView.of(model), fallback="fp16")
    nodes = plan.int8_nodes
    plan = plan.pin(nodes[1::3], "fp8", "mixed", origin=TUNER)
    plan = plan.pin(nodes[2::3], "fp16", "mixed", origin=TUNER)
    candidate = candidate_of(model, plan)
    info = RtxBackend(compute_capabilities=[capability]).build(candidate, tmp_path)
    assert info.not_honoured == ()
    built = {node: info.precisions[node] for node in nodes}
    # kernels that the compiler generates do not always say that they compute in half
    unlike = {node: found for node, found in built.items() if found != plan.precision(node)}
    assert {plan.precision(node) for node in unlike} <= {"fp16"}
    assert set(unlike.values()) <= {"unknown"}
    assert {"int8", "fp8", "fp16"} <= set(built.values())
