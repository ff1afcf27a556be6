"""A calibration cache and a list of pins of older TensorRT, as a plan and a table; and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import realdata
import tinymodels
import tinyqat
from tinyqat import assert_same_bits, imported
from tinyquant import named

import trtune
from trtune import tools
from trtune.calibrate.cache import Cache, dump_cache, parse_cache, read_cache
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import CacheError, ConfigError, InputError, ModelError
from trtune.configs.schema import Config
from trtune.precision.graph.view import GraphView, model_from_proto
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.rules import make_plan
from trtune.precision.quantized.migrate import PrecisionChange, migrate, migrate_files, to_cache
from trtune.precision.quantized.migrate_pins import LayerPin, explain_pins, parse_pins, parts_of
from trtune.precision.runtime.errors import sqnr_db

OLD = "TRT-8601-EntropyCalibration2"
EVERY = (
    "input", "conv1", "relu1", "conv2", "relu2", "pooled", "flat", "logits",
)  # fmt: skip


def cache(*tensors: str, header: str = OLD, **scales: float) -> Cache:
    """A cache with scale 0.02 for `tensors`."""
    return Cache(header, {**dict.fromkeys(tensors, 0.02), **scales})


def conv_relu() -> onnx.ModelProto:
    return tinymodels.conv_relu()


@pytest.mark.parametrize("name", ["conv_relu", "residual", "depthwise", "mlp", "attention"])
def test_the_result_is_what_the_main_job_makes_of_the_same_table(name: str) -> None:
    has_head = name not in ("mlp", "attention")
    prepared = named(name, pins={"op:Gemm": "fp32"} if has_head else None)
    old = parse_cache(dump_cache(Cache(OLD, dict(prepared.table.scales))))
    gemms = [n.name for n in prepared.view.nodes if n.op_type == "Gemm" and has_head]
    found = migrate(prepared.model, old, [LayerPin(gemm, "fp32") for gemm in gemms])
    assert not found.missing
    assert found.plan.int8_nodes == prepared.plan.int8_nodes
    assert dict(found.table.scales) == dict(prepared.table.scales)
    ours = lower_emulate(prepared.model, prepared.plan, prepared.table)
    theirs = lower_emulate(prepared.model, found.plan, found.table)
    assert ours.SerializeToString() == theirs.SerializeToString()
    assert_same_bits(ours, theirs, prepared.feeds)


def test_entries_of_no_tensor_are_listed_with_the_nearest_names() -> None:
    found = migrate(model_from_proto(conv_relu()), cache(*EVERY, "relu_1", "xyz"))
    first, second = found.unmatched
    assert first.name == "relu_1"
    assert first.near[0] == "relu1"
    assert second.near == ()
    assert found.matched == EVERY
    text = "\n".join(found.lines())
    assert "8 of 10 scales belong to tensors of this model; 3 of 3 weighted nodes" in text
    assert "no such tensor: 'relu_1' (nearest: 'relu1'" in text


def test_unnamed_layers_are_explained() -> None:
    entry = "(Unnamed Layer* 7) [Shuffle]_output"
    found = migrate(model_from_proto(conv_relu()), cache(*EVERY, entry))
    (unmatched,) = found.unmatched
    assert unmatched.near == ()
    assert "layer 7 of TensorRT's own count, a Shuffle" in unmatched.why


def test_a_node_without_a_scale_stays_float_and_says_so() -> None:
    found = migrate(model_from_proto(conv_relu()), cache("input", "conv1", "relu_1", "relu2"))
    assert found.plan.int8_nodes == ("n_conv1",)
    assert found.plan.nodes["n_conv2"].reason == "the cache has no scale for its input 'relu1'"
    assert [entry.name for entry in found.missing] == ["relu1", "flat"]
    assert found.missing[0].near[0] == "relu_1"


def test_a_tensor_that_was_only_zero_keeps_its_node_in_float() -> None:
    found = migrate(model_from_proto(conv_relu()), cache("input", "relu2", "flat", relu1=0.0))
    assert "n_conv2" not in found.plan.int8_nodes
    assert "was zero in every calibration picture" in found.plan.nodes["n_conv2"].reason


def test_what_ran_in_int8_before_and_does_not_now_is_listed() -> None:
    found = migrate(named("attention").model, cache("ln", "q", "k", "kt", "v", "mixed", "proj",
                                                    "scores", "scaled", "probs"))  # fmt: skip
    lost = {change.node: change for change in found.changes if change.before == "int8"}
    assert lost["n_scores"] == PrecisionChange(
        "n_scores", "MatMul", "int8", "fp32",
        "its weights are computed at run time (attention pattern)",
    )  # fmt: skip
    assert "n_scores (MatMul): int8 before, fp32 now" in "\n".join(found.lines())


def test_what_runs_in_int8_now_and_did_not_before_is_listed() -> None:
    found = migrate(
        model_from_proto(conv_relu()), cache("input", "conv1", "relu1", "relu2", "flat")
    )
    gained = [change for change in found.changes if change.now == "int8"]
    assert [change.node for change in gained] == ["n_logits"]
    assert "its output had no scale" in gained[0].reason


def test_a_pooling_that_ran_in_int8_by_itself_is_listed() -> None:
    found = migrate(model_from_proto(conv_relu()), cache(*EVERY))
    (change,) = found.changes
    assert (change.node, change.before, change.now) == ("n_pooled", "int8", "fp32")
    assert change.reason == "no pairs around it: it follows its neighbours"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a:fp32,b:fp16", [("a", "fp32"), ("b", "fp16")], id="trtexec"),
        pytest.param(
            "--layerPrecisions=*se*x:fp32", [("*se*x", "fp32")], id="trtexec, two wildcards"
        ),
        pytest.param("--layerPrecisions=a b:fp32", [("a b", "fp32")], id="trtexec, a blank"),
        pytest.param("a:b:fp32+fp16", [("a:b", "fp32")], id="trtexec, colon and two types"),
        pytest.param("# pins\na:fp32\nb:fp32", [("a", "fp32"), ("b", "fp32")], id="lines"),
        pytest.param(
            "trtexec --onnx=m.onnx --precisionConstraints=obey --layerPrecisions=a:fp32,b:fp16 "
            "--layerOutputTypes=c:fp32",
            [("a", "fp32"), ("b", "fp16")],
            id="a trtexec command line",
        ),
        pytest.param(
            "--precision-constraints obey --layer-precisions a:float32 b:float16",
            [("a", "fp32"), ("b", "fp16")],
            id="polygraphy with constraints",
        ),
        pytest.param("a:float32 b:half", [("a", "fp32"), ("b", "fp16")], id="polygraphy"),
        pytest.param(
            "--layer-precisions 'a b':float16", [("a b", "fp16")], id="polygraphy, quoted"
        ),
    ],
)
def test_pins_are_read(text: str, expected: list[tuple[str, str]]) -> None:
    assert [(pin.layer, pin.precision) for pin in parse_pins(text)] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("  \n", "is empty", id="nothing"),
        pytest.param("conv1", r"expected `layer:precision`.*found 'conv1'", id="no precision"),
        pytest.param("a:fp31", "precision 'fp31', which is none; did you mean 'fp32'", id="typo"),
        pytest.param('{"a": 1}', r"is JSON, but no plan\.json", id="other JSON"),
        pytest.param("--layerPrecisions=", "no layer is named", id="an empty option"),
        pytest.param("--layer-precisions 'a:fp32", "No closing quotation", id="an open quote"),
    ],
)
def test_bad_pins_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_pins(text)


def test_the_pinned_nodes_of_a_plan_are_pins() -> None:
    view = GraphView.of(model_from_proto(conv_relu()))
    plan = make_plan(view, pins={"n_conv2": "fp32"})
    assert parse_pins(plan.to_json()) == (LayerPin("n_conv2", "fp32"),)


def test_pins_hold_for_the_nodes_they_name() -> None:
    found = migrate(
        model_from_proto(conv_relu()),
        cache(*EVERY),
        parse_pins(
            "n_conv*:fp32,n_conv1:int8,nothing:fp32,(Unnamed Layer* 3) [Scale]:fp32,x:int32"
        ),
    )
    assert found.plan.int8_nodes == ("n_conv1", "n_logits")
    first, second, third, fourth, fifth = found.pins
    assert first.nodes == ("n_conv1", "n_relu1", "n_conv2", "n_relu2")
    assert second.nodes == ("n_conv1", "n_relu1")
    assert (third.nodes, third.note) == ((), "no such node")
    assert "layer 3 of TensorRT's own count" in fourth.note
    assert not fifth.nodes
    assert "pin nothing:fp32 holds for nothing" in "\n".join(found.lines())


def test_a_pin_on_a_node_inside_a_fused_group_says_what_it_takes_along() -> None:
    found = migrate(model_from_proto(conv_relu()), cache(*EVERY), [LayerPin("n_relu1", "fp32")])
    (pin,) = found.pins
    assert pin.nodes == ("n_conv1", "n_relu1")
    assert pin.note == "n_relu1 is fused behind n_conv1, so the whole group is pinned"
    assert "n_conv1" not in found.plan.int8_nodes


def test_a_pin_on_a_layer_of_an_engine_holds_for_its_parts() -> None:
    found = migrate(
        model_from_proto(conv_relu()), cache(*EVERY), [LayerPin("n_conv2 + n_relu2", "fp32")]
    )
    assert found.pins[0].nodes == ("n_conv2", "n_relu2")


def test_integer_pins_and_impossible_ones_are_told() -> None:
    found = migrate(
        named("attention").model,
        cache("ln", "mixed"),
        [LayerPin("n_scores", "int8"), LayerPin("n_q", "int32")],
    )
    assert [pin.note for pin in found.pins] == [
        "no int8 for n_scores: its weights are computed at run time (attention pattern)",
        "integers stay what they are",
    ]


def test_names_in_an_engine() -> None:
    assert list(parts_of("a + b + PWN(PWN(c), d)")) == ["a", "b", "c", "d"]
    assert explain_pins("{ForeignNode[a...z]}") == (
        "a part of the network that was compiled as a whole, a to z"
    )
    assert explain_pins("conv1") == ""


# Bad input


def test_a_cache_of_another_model() -> None:
    with pytest.raises(CacheError, match=r"belongs to another model: 3 of 3 tensors"):
        migrate(model_from_proto(conv_relu()), cache("a", "b"))


def test_a_cache_with_a_header_only() -> None:
    with pytest.raises(CacheError, match="a header and no scale"):
        migrate(model_from_proto(conv_relu()), cache())


def test_a_file_that_computes_in_float16_is_migrated(tmp_path: Path) -> None:
    proto = tinymodels.in_half(tinymodels.conv_relu())
    onnx.save(proto, tmp_path / "half.onnx")
    names = [*(info.name for info in proto.graph.input)]
    names += [name for node in proto.graph.node for name in node.output]
    lines = ["TRT-8601-EntropyCalibration2", *(f"{name}: 3d010a14" for name in names)]
    (tmp_path / "half.cache").write_text("\n".join(lines) + "\n")
    model, moved = migrate_files(tmp_path / "half.onnx", tmp_path / "half.cache", fallback="fp16")
    assert model.half == "float16"
    assert len(moved.plan.int8_nodes) == 3
    assert moved.table.scale("input/float32") == moved.table.scale("input")
    assert not moved.missing
    lowered = lower_emulate(model, moved.plan, moved.table)
    rows = tinymodels.feeds(proto, batch=2, seed=0)
    assert next(iter(tinymodels.run(lowered, rows).values())).dtype == np.float16


def test_a_model_in_half_precision() -> None:
    with pytest.raises(ModelError, match=r"in half precision already \(1 nodes, such as 'n_conv'"):
        migrate(named("half_weights").model, cache("input"))


def test_caches_after_fusion_are_remarked_on() -> None:
    old = cache(*EVERY, header="TRT-8601-LegacyCalibration")
    assert (
        "after TensorRT has fused layers" in migrate(model_from_proto(conv_relu()), old).lines()[1]
    )


def write(folder: Path, cache_text: str, pins: str | None = None) -> tuple[Path, Path, Path | None]:
    model = folder / "model.onnx"
    onnx.save(conv_relu(), model)
    (folder / "old.cache").write_text(cache_text)
    if pins is None:
        return model, folder / "old.cache", None
    (folder / "pins.txt").write_text(pins)
    return model, folder / "old.cache", folder / "pins.txt"


def test_from_files(tmp_path: Path) -> None:
    model, found = migrate_files(*write(tmp_path, dump_cache(cache(*EVERY)), "n_conv1:fp32"))
    assert found.plan.int8_nodes == ("n_conv2", "n_logits")
    assert model.path == tmp_path / "model.onnx"


@pytest.mark.parametrize(
    ("text", "pins", "message"),
    [
        pytest.param(f"{OLD}\nx: 1\nx: 2\n", None, r"line 3: 'x' already has a scale in line 2",
                     id="a name twice"),
        pytest.param(f"{OLD}\n", None, r"old\.cache: .* header and no scale", id="header only"),
        pytest.param(f"{OLD}\nfoo: 3c000000\n", None, r"old\.cache: .*another model", id="foreign"),
        pytest.param("hello", None, "line 1: expected a header", id="no cache"),
        pytest.param(dump_cache(cache(*EVERY)), "n_conv1", r"pins\.txt: expected `layer:precision`",
                     id="bad pins"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, text: str, pins: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        migrate_files(*write(tmp_path, text, pins))


def test_missing_pins(tmp_path: Path) -> None:
    model, old, _ = write(tmp_path, dump_cache(cache(*EVERY)))
    with pytest.raises(ConfigError, match="cannot read the pinned layers"):
        migrate_files(model, old, tmp_path / "none.txt")


def test_a_pin_by_a_name_that_several_nodes_have(tmp_path: Path) -> None:
    model, old, pins = write(tmp_path, dump_cache(cache(*EVERY)), "Conv:fp32")
    onnx.save(tinymodels.duplicate_names(), model)
    with pytest.raises(InputError, match=r"Conv:fp32 names 2 nodes .* not unique"):
        migrate_files(model, old, pins)


# The other direction


def test_qdq_scales_become_a_cache_for_tensorrt_10() -> None:
    found = imported(tinyqat.quantized_output())
    view = GraphView.of(found.model)
    back, left = to_cache(view, found.table)
    assert back.header == "TRT-101401-EntropyCalibration2"
    assert parse_cache(dump_cache(back)) == back
    assert back.scales["pool"] == back.scales["conv"] == np.float32(0.02)
    assert left == ()


def test_the_cache_says_which_nodes_stay_float_there() -> None:
    view = GraphView.of(model_from_proto(conv_relu()))
    table = CalibrationTable({"input": 0.02, "relu1": 0.02})
    back, left = to_cache(view, table, (8, 6, 1))
    assert back.version == (8, 6, 1)
    assert left == ("n_conv2", "n_logits")


def test_a_cache_and_back_is_the_same_table() -> None:
    prepared = named("residual")
    back, _ = to_cache(prepared.view, prepared.table)
    again = migrate(prepared.model, back)
    assert {t: again.table.scales[t] for t in prepared.table.scales} == dict(prepared.table.scales)


def closeness(model: Path, other: Path) -> float:
    """SQNR in dB of `other` against `model` on 128 pictures."""
    pictures = np.load(realdata.data_dir() / "cifar10_test2000.npz")["images"][:128]
    mean, std = np.float32([0.4914, 0.4822, 0.4465]), np.float32([0.2470, 0.2435, 0.2616])
    feed = ((pictures.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    found = []
    for path in (model, other):
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        (outputs,) = session.run(None, {"input": feed.astype(np.float32)})
        found.append(outputs)
    return sqnr_db(*found)


@pytest.mark.slow
@realdata.needs_data
@pytest.mark.parametrize(
    ("name", "least", "most"), [("resnet20_cifar10", 27, 8), ("mobilenetv2_cifar10", 16, 8)]
)
def test_a_right_and_a_foreign_cache_of_a_real_network(
    tmp_path: Path, name: str, least: float, most: float
) -> None:
    """`least` dB with its own cache; with scales of other layers it is refused, or at `most`."""
    model = realdata.data_dir() / "models" / f"{name}.onnx"
    section = {
        "source": "arrays",
        "preprocess": {"scale": 1 / 255, "mean": [0.4914, 0.4822, 0.4465],
                       "std": [0.2470, 0.2435, 0.2616], "layout": "NCHW", "channels": "RGB"},
    }  # fmt: skip
    data = {
        "calibration": {**section, "path": str(realdata.data_dir() / "cifar10_calib512.npz"),
                        "take": 128},
        "evaluation": {**section, "path": str(realdata.data_dir() / "cifar10_test2000.npz"),
                       "take": 256},
    }  # fmt: skip
    config = {
        "version": 1,
        "name": name,
        "model": {"path": str(model)},
        "data": data,
        "calibration": {"method": "entropy", "prepare": "none"},
    }
    trtune.calibrate(Config.model_validate(config), out=tmp_path / "runs")
    (made,) = (tmp_path / "runs").glob("*/calibration.cache")
    found = read_cache(made).scales
    names, scales = list(found), list(found.values())
    third = len(names) // 3
    for kind, values in (("own", scales), ("foreign", scales[third:] + scales[:third])):
        cache = Cache("TRT-8601-EntropyCalibration2", dict(zip(names, values, strict=True)))
        (tmp_path / kind).write_text(dump_cache(cache))
    own = tools.migrate(model, tmp_path / "own", tmp_path / "a")
    assert own.fit is not None
    assert own.fit.belongs
    with pytest.raises(CacheError, match=r"does not belong to this model.*--force"):
        tools.migrate(model, tmp_path / "foreign", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    tools.migrate(model, tmp_path / "foreign", tmp_path / "b", foreign=True)
    assert closeness(model, tmp_path / "a" / "model.onnx") > least
    assert closeness(model, tmp_path / "b" / "model.onnx") < most
