"""TensorRT-RTX: engines built for real, what every node got, and what cannot be built."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinymodels
from onnx import helper
from PIL import Image
from realdata import data_dir, needs_data
from rtxparts import needs_rtx
from tinymodels import Net
from tinyquant import outputs

from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import ConfigError, ModelError, TrtuneError
from trtune.datasets import Preprocess, open_source
from trtune.datasets.batches import Batch
from trtune.precision.backends.gpu.profiles import Gpu
from trtune.precision.backends.rtx import backend as rtx
from trtune.precision.backends.rtx import support as rtxsupport
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.backends.rtx.process import why_not_loaded
from trtune.precision.backends.rtx.support import why_not
from trtune.precision.graph.view import GraphView, load_model, model_from_proto
from trtune.precision.plan.placement import place
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import make_plan
from trtune.precision.runtime.api import Candidate
from trtune.precision.runtime.engine_json import read_engine_json, reusable
from trtune.precision.tune.scales import calibrate_model

FILES = {"engine.plan", "model.onnx", "build.log", "engine.json"}
ADA = RtxBackend(compute_capabilities=["8.9"])
L4, H200 = Gpu("NVIDIA L4", "8.9", "580.1"), Gpu("NVIDIA H200", "9.0", "580.1")


def candidate_of(
    proto: onnx.ModelProto, pins: Mapping[str, str] | None = None, fallback: str = "fp32"
) -> Candidate:
    model = model_from_proto(proto)
    view = GraphView.of(model)
    table = CalibrationTable({t: 0.05 for t in place(view, make_plan(view)).activations})
    return Candidate(model, make_plan(view, pins=pins, fallback=fallback), table)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def joint_attention() -> onnx.ModelProto:
    """One projection to query, key and value, split behind a transposition, as torch exports it."""
    net = Net()
    x = net.input("input", ("N", 6, 16))
    x = net.op("Relu", x, out="relu")
    y = net.op("MatMul", x, net.weight("qkv_w", 16, 48), out="qkv")
    y = net.op("Add", net.weight("qkv_b", 48), y, out="biased")
    y = net.op("Reshape", y, net.const("five", [0, 0, 3, 2, 8], np.int64), out="heads")
    y = net.op("Transpose", y, out="moved", perm=[2, 0, 3, 1, 4])
    parts = net.const("parts", [1, 1, 1], np.int64)
    net.nodes.append(helper.make_node("Split", [y, parts], ["q1", "k1", "v1"], "n_split", axis=0))
    axis = net.const("axis", [0], np.int64)
    q, k, v = (net.op("Squeeze", f"{name}1", axis, out=name) for name in "qkv")
    k = net.op("Transpose", k, out="kt", perm=[0, 1, 3, 2])
    p = net.op("Softmax", net.op("MatMul", q, k, out="scores"), out="probs", axis=-1)
    y = net.op("Transpose", net.op("MatMul", p, v, out="mixed"), out="back", perm=[0, 2, 1, 3])
    y = net.op("Reshape", y, net.const("three", [0, 0, 16], np.int64), out="joined")
    net.op("MatMul", y, net.weight("proj_w", 16, 16), out="output")
    return net.model({"output": ("N", 6, 16)})


# What every node got


@needs_rtx
@pytest.mark.parametrize(
    "name", ["depthwise", "concat", "silu_se", "attention", "mlp", "dynamic_reshape", "branches"]
)
def test_everything_planned_in_int8_is_int8(name: str, tmp_path: Path) -> None:
    candidate = candidate_of(tinymodels.MODELS[name]())
    info = ADA.build(candidate, tmp_path)
    assert candidate.plan.int8_nodes
    assert {info.precisions[node] for node in candidate.plan.int8_nodes} == {"int8"}
    assert info.not_honoured == ()
    assert files(tmp_path) == FILES


@needs_rtx
def test_pins_are_honoured_and_the_folder_says_what_was_built(tmp_path: Path) -> None:
    candidate = candidate_of(tinymodels.residual(), {"n_conv1": "fp32", "op:Gemm": "fp32"})
    info = ADA.build(candidate, tmp_path)
    found = {node: info.precisions[node] for node in candidate.plan.compute_nodes}
    assert found == {"n_stem": "int8", "n_conv1": "fp32", "n_conv2": "int8", "n_logits": "fp32"}
    assert info.not_honoured == ()
    assert info.path == tmp_path / "engine.plan"
    assert info.size_bytes == info.path.stat().st_size
    assert info.seconds > 0
    assert "Engine generation completed" in info.log
    read = read_engine_json(tmp_path)
    assert read.details == info.details
    assert dict(read.precisions) == dict(info.precisions)
    assert info.details["profiles"]["input"]["max"] == [32, 3, 8, 8]
    assert info.details["kernels"]["n_conv1"] == ["n_conv1_myl0_4"]
    assert info.details["command"] == (
        "tensorrt_rtx --onnx=model.onnx --saveEngine=engine.plan --computeCapabilities=89 "
        "--skipInference --minShapes=input:1x3x8x8 --optShapes=input:8x3x8x8 "
        "--maxShapes=input:32x3x8x8 --noTF32"
    )
    onnx.checker.check_model(tmp_path / "model.onnx")


@needs_rtx
def test_a_product_that_the_compiler_would_take_apart_is_kept_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    candidate = candidate_of(joint_attention())
    with caplog.at_level(logging.INFO):
        info = ADA.build(candidate, tmp_path)
    assert info.precisions["n_qkv"] == info.precisions["n_output"] == "int8"
    assert info.not_honoured == ()
    assert info.details["guarded"] == ["n_qkv"]
    assert "took n_qkv apart: built again" in caplog.text
    feeds = tinymodels.feeds(candidate.model.proto)
    built = outputs(onnx.load(tmp_path / "model.onnx"), feeds, optimize="none")["output"]
    plain = RtxBackend.lowered(candidate)
    np.testing.assert_array_equal(built, outputs(plain, feeds, optimize="none")["output"])


@needs_rtx
def test_a_planned_int8_node_that_came_out_in_float_is_named(tmp_path: Path) -> None:
    info = ADA.build(candidate_of(tinymodels.resize()), tmp_path)
    assert {n for n, p in info.precisions.items() if p == "int8"} >= {"n_conv", "n_output"}
    (sentence,) = info.not_honoured
    assert sentence.startswith("n_up: planned int8, runs in fp32: kernel n_up_myl0_")
    assert sentence.endswith("(deconv) on Float")


@needs_rtx
def test_no_pairs_stand_around_what_the_compiler_has_in_float_only(tmp_path: Path) -> None:
    candidate = candidate_of(tinymodels.resize())
    info = ADA.build(candidate, tmp_path)
    assert candidate.plan.is_int8("n_up")
    built = onnx.load(tmp_path / "model.onnx")
    made = {tensor: node for node in built.graph.node for tensor in node.output}
    (up,) = (node for node in built.graph.node if node.op_type == "ConvTranspose")
    assert not any(made[t].op_type == "DequantizeLinear" for t in up.input if t in made)
    assert info.precisions["n_conv"] == "int8"


@needs_rtx
def test_an_unread_log_gives_unknown_and_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtx, "read_kernels", lambda text: None)
    info = ADA.build(candidate_of(tinymodels.residual()), tmp_path)
    assert set(info.precisions.values()) == {"unknown"}
    assert len(info.not_honoured) == 1
    assert "precisions are unknown" in info.not_honoured[0]


# Settings


@needs_rtx
def test_settings_reach_the_compiler(tmp_path: Path) -> None:
    backend = RtxBackend(
        compute_capabilities=["8.6", "12.0", "8.6"],
        workspace=64 << 20,
        optimization_level=1,
        shapes={"input": {"min": [2, 3, 8, 8], "opt": [2, 3, 8, 8], "max": [4, 3, 8, 8]}},
        tf32=True,
    )
    candidate = candidate_of(tinymodels.residual())
    info = backend.build(candidate, tmp_path)
    log = (tmp_path / "build.log").read_text("utf-8")
    assert "Number of target compute capabilities: 2" in log
    assert "MinShape: [2,3,8,8], OptShape: [2,3,8,8], MaxShape: [4,3,8,8]" in log
    assert info.details["compute_capabilities"] == ["8.6", "12.0"]
    assert "--computeCapabilities=86,120" in info.details["command"]
    assert "--memPoolSize=workspace:64M --builderOptimizationLevel=1" in info.details["command"]
    assert "TF32" not in info.details["command"]
    again = {"backend": backend.name, "versions": backend.versions}
    assert reusable(tmp_path, candidate, **again, settings=backend.settings) is not None
    assert reusable(tmp_path, candidate, **again, settings=ADA.settings) is None


@needs_rtx
def test_a_model_of_fixed_batch_needs_no_profile(tmp_path: Path) -> None:
    info = ADA.build(candidate_of(tinymodels.fixed_batch()), tmp_path)
    assert info.details["profiles"] == {}
    assert info.not_honoured == ()


@needs_rtx
def test_the_same_candidate_gives_the_same_engine(tmp_path: Path) -> None:
    candidate = candidate_of(tinymodels.mlp())
    for name in ("a", "b"):
        ADA.build(candidate, tmp_path / name)
    first, second = ((tmp_path / name / "engine.plan").read_bytes() for name in ("a", "b"))
    assert first == second


# What cannot be built


@pytest.mark.parametrize(
    ("found", "words"),
    [
        pytest.param("9.0", ["9.0 is not supported", "8.9", "12.0"], id="Hopper"),
        pytest.param("89", ["89 is not supported", "did you mean '8.9'"], id="without the point"),
    ],
)
def test_a_compute_capability_that_is_not_supported(found: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        RtxBackend(compute_capabilities=["8.9", found])
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        pytest.param(None, "no NVIDIA GPU was found here; name what to build for", id="no GPU"),
        pytest.param(H200, "capability 9.0 is not supported .* NVIDIA H200", id="not supported"),
    ],
)
def test_no_compute_capability_named_needs_a_gpu(
    gpu: Gpu | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtx, "find_gpu", lambda: gpu)
    with pytest.raises(ConfigError, match=words):
        RtxBackend().targets()


def test_no_compute_capability_named_is_that_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "find_gpu", lambda: L4)
    assert RtxBackend().targets() == ("8.9",)


def assert_refused(
    backend: RtxBackend, candidate: Candidate, folder: Path, kind: type[TrtuneError], words: str
) -> None:
    """`build` raises, and leaves nothing behind."""
    with pytest.raises(kind, match=words):
        backend.build(candidate, folder)
    assert not folder.exists() or files(folder) == set()


@needs_rtx
def test_int8_for_a_gpu_without_it_is_refused(tmp_path: Path) -> None:
    turing = RtxBackend(compute_capabilities=["8.9", "7.5"])
    assert_refused(turing, candidate_of(tinymodels.mlp()), tmp_path, ConfigError, "no INT8 for 7.5")


@needs_rtx
def test_a_node_that_the_compiler_refuses_loses_its_pairs_and_then_the_build_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On Turing the product is refused in int8 first, and then in float too."""
    monkeypatch.setattr(rtx, "WITHOUT_INT8", ())
    turing = RtxBackend(compute_capabilities=["7.5"])
    candidate = candidate_of(tinymodels.residual())
    words = "Cannot compile operation 'n_logits' for Turing"
    assert_refused(turing, candidate, tmp_path, TrtuneError, words)
    assert "refuses n_logits as planned: built again without" in caplog.text


@needs_rtx
def test_a_node_that_the_compiler_refuses_is_built_in_the_fallback_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Turing there is no INT8, and no product in fp32, but one in fp16."""
    monkeypatch.setattr(rtx, "WITHOUT_INT8", ())
    candidate = candidate_of(tinymodels.mlp(), fallback="fp16")
    plan = candidate.plan
    nodes = {
        name: replace(a, around="fp32") if plan.is_int8(name) else a
        for name, a in plan.nodes.items()
    }
    candidate = replace(candidate, plan=replace(plan, nodes=nodes))
    info = RtxBackend(compute_capabilities=["7.5"]).build(candidate, tmp_path)
    assert info.details["unquantized"] == ["n_fc1", "n_fc2"]
    for node, sentence in zip(candidate.plan.int8_nodes, info.not_honoured, strict=True):
        assert sentence.startswith(f"{node}: planned int8, built without Q/DQ and runs in ")
        assert f"Cannot compile operation '{node}'" in sentence
    assert files(tmp_path) == FILES


@needs_rtx
def test_an_unsupported_operator_is_the_models_fault(tmp_path: Path) -> None:
    net = Net()
    x = net.conv(net.input("input", (1, 3, 8, 8)), "conv", 3, 16)
    net.op("Unique", x, out="y")
    candidate = candidate_of(net.model({"y": (None,)}))
    words = r"node 'n_y' \(operator Unique, opset 17\)"
    assert_refused(ADA, candidate, tmp_path, ModelError, words)


@needs_rtx
def test_free_dimensions_without_shapes_are_refused(tmp_path: Path) -> None:
    proto = tinymodels.conv_relu()
    proto.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "W"
    words = r"input 'input' has free dimensions \[N, 3, 8, W\].*model\.shapes\.input"
    assert_refused(ADA, candidate_of(proto), tmp_path, ConfigError, words)


@needs_rtx
def test_a_build_that_takes_too_long_leaves_nothing(tmp_path: Path) -> None:
    hasty = RtxBackend(compute_capabilities=["8.9"], timeout=0.05)
    candidate = candidate_of(tinymodels.residual())
    assert_refused(hasty, candidate, tmp_path, TrtuneError, "stopped after 0.05 s")


@needs_rtx
def test_a_failed_build_leaves_the_engine_of_before(tmp_path: Path) -> None:
    candidate = candidate_of(tinymodels.mlp())
    ADA.build(candidate, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    with pytest.raises(TrtuneError, match="stopped after"):
        RtxBackend(compute_capabilities=["8.9"], timeout=0.05).build(candidate, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrtuneError, match="cannot write into"), rtx.scratch(tmp_path / "file"):
        pass


def test_building_without_the_library_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtx, "rtx_version", lambda: None)
    words = r"needs tensorrt-rtx, not installed: pip install 'trtune\[rtx\]'"
    assert_refused(ADA, candidate_of(tinymodels.mlp()), tmp_path, TrtuneError, words)


# Running


@pytest.mark.parametrize(
    ("gpu", "targets", "words"),
    [
        pytest.param(L4, ["8.6", "8.9"], "", id="it can"),
        pytest.param(None, ["8.9"], "no NVIDIA GPU was found", id="no GPU"),
        pytest.param(H200, ["8.9"], "compute capability 9.0 is not supported", id="Hopper"),
        pytest.param(L4, ["8.6"], 'built for compute capability 8.6, and this is', id="another"),
    ],
)  # fmt: skip
def test_why_an_engine_cannot_run(gpu: Gpu | None, targets: list[str], words: str) -> None:
    found = why_not(gpu, targets)
    assert words in found
    assert bool(words) == bool(found)


@needs_rtx
def test_the_installed_library_loads() -> None:
    assert why_not_loaded() == ""


@needs_rtx
def test_loading_says_why_it_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrtuneError, match="holds no built engine"):
        ADA.load(tmp_path)
    info = ADA.build(candidate_of(tinymodels.mlp()), tmp_path)
    monkeypatch.setattr(rtx, "find_gpu", lambda: H200)
    with pytest.raises(TrtuneError, match=r"cannot run here: compute capability 9\.0 is not supp"):
        ADA.load(tmp_path)
    assert info.path is not None
    info.path.unlink()
    with pytest.raises(TrtuneError, match=r"holds no engine\.plan; build it again"):
        ADA.load(tmp_path)


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "rtx_version", lambda: "1.7.1.116")
    monkeypatch.setattr(rtx, "why_not_loaded", lambda: "")
    monkeypatch.setattr(rtx, "find_gpu", lambda: None)
    found = ADA.doctor()
    assert (found.usable, found.version) == (True, "1.7.1.116")
    assert "builds here, but cannot run: no NVIDIA GPU" in found.reason
    monkeypatch.setattr(rtx, "find_gpu", lambda: L4)
    assert (ADA.doctor().usable, ADA.doctor().reason) == (True, "")
    monkeypatch.setattr(rtx, "rtx_version", lambda: None)
    found = ADA.doctor()
    assert (found.usable, found.remedy) == (False, "pip install 'trtune[rtx]'")


def test_doctor_tells_a_library_that_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text("raise ImportError('libnvinfer.so: not found')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(rtx, "rtx_version", lambda: "1.7.1.116")
    found = ADA.doctor()
    assert not found.usable
    assert found.reason.endswith("cannot be loaded: ImportError: libnvinfer.so: not found")
    assert "--force-reinstall" in found.remedy


def test_what_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise rtxsupport.PackageNotFoundError(name)

    monkeypatch.setattr(rtxsupport, "version", missing)
    assert rtxsupport.rtx_version() is None
    assert rtxsupport.cuda_version() is None


# Real models


class Letterboxed:
    """COCO pictures as YOLOX reads them: BGR 0..255, scaled to 416 and pasted on grey 114."""

    identity, skipped, count = "coco", (), 8

    def __iter__(self) -> Iterator[Batch]:
        for path in sorted((data_dir() / "images/coco_val2017_128").rglob("*.jpg"))[: self.count]:
            image = Image.open(path).convert("RGB")
            image.thumbnail((416, 416))
            canvas = Image.new("RGB", (416, 416), (114, 114, 114))
            canvas.paste(image)
            pixels = np.asarray(canvas, np.float32)[:, :, ::-1].transpose(2, 0, 1)
            yield Batch({"images": np.ascontiguousarray(pixels[np.newaxis])}, (path.name,))


CIFAR = Preprocess(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
IMAGENET = Preprocess(resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def real_candidate(name: str, pins: Mapping[str, str]) -> tuple[Candidate, PrecisionPlan]:
    model = load_model(data_dir() / f"models/{name}.onnx")
    view = GraphView.of(model)
    if name.startswith("yolox"):
        source = Letterboxed()
    else:
        kind, place_, preprocess = (
            ("arrays", "cifar10_calib512.npz", CIFAR)
            if name.endswith("cifar10")
            else ("images", "images/nips17", IMAGENET)
        )
        source = open_source(
            kind,
            str(data_dir() / place_),
            inputs=model.inputs,
            preprocess=preprocess,
            take=8,
            batch=8,
        )
    plan = make_plan(view, pins=pins)
    table = calibrate_model(model, view, make_plan(view), source, method="max").table
    return Candidate(model, plan, table), plan


@needs_rtx
@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pins", "int8"),
    [
        pytest.param("resnet20_cifar10", {"/c/Conv": "fp32", "op:Gemm": "fp32"}, 20, id="resnet20"),
        pytest.param("mobilenetv2_cifar10", {}, 53, id="mobilenetv2"),
        pytest.param("efficientnet_b0_cifar10", {"re:.*/se/.*": "fp32"}, 50, id="efficientnet"),
        pytest.param("vit_cifar10", {"/head/Gemm": "fp32"}, 33, id="vit"),
        pytest.param("mobilenetv2_imagenet", {"conv_0": "fp32"}, 52, id="mobilenetv2_imagenet"),
        pytest.param("squeezenet1.1_imagenet", {}, 26, id="squeezenet"),
        pytest.param("yolox_nano_coco", {"Conv_394": "fp32"}, 112, id="yolox_nano"),
    ],
)
def test_real_models_get_what_was_planned(
    name: str, pins: dict[str, str], int8: int, tmp_path: Path
) -> None:
    candidate, plan = real_candidate(name, pins)
    info = ADA.build(candidate, tmp_path)
    assert info.not_honoured == ()
    assert len(plan.int8_nodes) == int8
    assert all(info.precisions[node] == "int8" for node in plan.int8_nodes)
    assert all(info.precisions[node] == "fp32" for node in plan.pinned)
    assert json.loads((tmp_path / "engine.json").read_text())["size_bytes"] == info.size_bytes
