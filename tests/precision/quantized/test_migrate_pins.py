"""Lists of pins as public scripts write them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import realdata

from trtune.calibrate.cache import Cache, dump_cache
from trtune.configs.errors import ConfigError
from trtune.precision.graph.file import model_from_proto
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.rules import make_plan
from trtune.precision.quantized.migrate import migrate_files
from trtune.precision.quantized.migrate_pins import LayerPin, parse_pins, read_pins, with_layer_pins

C0, M0, M1, M2 = "/model.0/Conv", "/model.24/m.0/Conv", "/model.24/m.1/Conv", "/model.24/m.2/Conv"
NODES = (C0, M0, M1, M2)


def chain() -> onnx.ModelProto:
    """Four convolutions in a row, called as a YOLO's are."""
    tensors = ["images", *(f"{name}_output_0" for name in NODES)]
    helper = onnx.helper
    nodes = [
        helper.make_node("Conv", [tensors[k], f"w{k}"], [tensors[k + 1]], name, pads=[1] * 4)
        for k, name in enumerate(NODES)
    ]
    weights = [
        helper.make_tensor(f"w{k}", 1, [4, 4, 3, 3], [0.01 * (j % 7 - 3) for j in range(144)])
        for k in range(4)
    ]
    ends = [helper.make_tensor_value_info(t, 1, [1, 4, 8, 8]) for t in (tensors[0], tensors[-1])]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


LP = "--layerPrecisions="
FORMS = [
    pytest.param(f"{LP}{M0}:fp16", {M0: "fp16"}, id="one option"),
    pytest.param(f'{LP}"{M0}":fp16,"{M1}":fp16', {M0: "fp16", M1: "fp16"}, id="quotes inside"),
    pytest.param(f"{LP}'{M0}':fp16", {M0: "fp16"}, id="single quotes inside"),
    pytest.param(f'{LP}"{M0}:fp16,{M1}:fp32"', {M0: "fp16", M1: "fp32"}, id="value quoted"),
    pytest.param(f"trtexec --fp16 '{LP}*:fp32,{M0}:fp16' --int8",
                 {C0: "fp32", M0: "fp16", M1: "fp32", M2: "fp32"}, id="option quoted as a whole"),
    pytest.param(f'trtexec --onnx=m.onnx \\\n  --precisionConstraints="obey" \\\n  {LP}{M0}:fp16 \\'
                 "\n  --saveEngine=m.plan", {M0: "fp16"}, id="continued lines"),
    pytest.param(f"trtexec ^\r\n  {LP}{M0}:fp16 ^\r\n --int8\r\n", {M0: "fp16"}, id="a batch file"),
    pytest.param(f"# {LP}{M1}:fp32\ntrtexec {LP}{M0}:fp16  # {M2}:fp32", {M0: "fp16"},
                 id="comments"),
    pytest.param(f"# old \\\ntrtexec {LP}{M0}:fp16", {M0: "fp16"}, id="a comment is not continued"),
    pytest.param(f"{LP} {M0}:fp16", {M0: "fp16"}, id="option and value apart"),
    pytest.param(f"a --x && trtexec {LP}{M0}:fp16; rm x", {M0: "fp16"}, id="one of more commands"),
    pytest.param(f"t {LP}{M0}:fp16\nt --int8 {LP}{M0}:fp16", {M0: "fp16"}, id="equal commands"),
    pytest.param(f"{LP}{M0}:int8,*:fp32", {C0: "fp32", M1: "fp32", M2: "fp32"},
                 id="exact before wildcard, exact first"),
    pytest.param(f"{LP}*:fp32,{M0}:int8", {C0: "fp32", M1: "fp32", M2: "fp32"},
                 id="exact before wildcard, wildcard first"),
    pytest.param(f"{LP}/model.24*:fp16,*m.2/Conv:fp32", {M0: "fp16", M1: "fp16", M2: "fp32"},
                 id="two wildcards"),
    pytest.param(f"{LP}{M0}:fp16 --layerOutputTypes={M1}:fp32", {M0: "fp16"}, id="types too"),
    pytest.param(f"polygraphy run m --trt --layer-precisions {M0}:float16 {M1}:float32 --int8",
                 {M0: "fp16", M1: "fp32"}, id="polygraphy, words"),
    pytest.param(f'polygraphy run m --layer-precisions "{M0}:float32,{M1}:float32"',
                 {M0: "fp32", M1: "fp32"}, id="polygraphy, commas"),
    pytest.param(f"{M0}:fp16\n{M1}:fp32\n", {M0: "fp16", M1: "fp32"}, id="a line each"),
    pytest.param(f"{M0}:half,{M1}:float", {M0: "fp16", M1: "fp32"}, id="other words for types"),
    pytest.param(f"L={M0}:fp16,{M1}:fp32\nt {LP}$L", {M0: "fp16", M1: "fp32"}, id="a variable"),
    pytest.param(f'{LP}"{M0} + {M1}":fp16', {M0: "fp16", M1: "fp16"}, id="a fused name"),
    pytest.param(f"{M0} || PWN({M1}, {M2}):fp32", {M0: "fp32", M1: "fp32", M2: "fp32"},
                 id="a merged and a pointwise name"),
    pytest.param("{ForeignNode[" + M0 + "..." + M2 + "]}:fp16",
                 {M0: "fp16", M1: "fp16", M2: "fp16"}, id="a region"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), FORMS)
def test_forms_of_pins(text: str, expected: dict[str, str]) -> None:
    view = GraphView.of(model_from_proto(chain()))
    plan, told = with_layer_pins(view, make_plan(view), parse_pins(text))
    found = {name: plan.precision(name) for name in NODES if plan.precision(name) != "int8"}
    assert found == expected
    assert all(note.known for note in told)


def test_there_are_24_of_them() -> None:
    assert len(FORMS) == 24


def test_several_commands_that_differ_are_asked_about() -> None:
    text = f"trtexec --onnx=a.onnx {LP}a:fp16\ntrtexec --onnx=b.onnx {LP}b:fp32\n"
    with pytest.raises(ConfigError, match=r"which command .*1: trtexec --onnx=a.*2: trtexec --onn"):
        parse_pins(text)
    assert parse_pins(text, command=2) == (LayerPin("b", "fp32"),)
    with pytest.raises(ConfigError, match="no command 3"):
        parse_pins(text, command=3)


def test_output_types_alone_are_named() -> None:
    with pytest.raises(ConfigError, match=r"types of outputs alone \(output:fp32\)"):
        parse_pins("trtexec --onnx=m.onnx --layerOutputTypes=output:fp32")
    assert "layerOutputTypes" in read_pins(f"{LP}a:fp16 --layerOutputTypes=b:fp32").notes[0]


def test_a_command_without_constraints_is_remarked_on() -> None:
    (note,) = read_pins(f"trtexec --onnx=m.onnx {LP}a:fp16").notes
    assert "--precisionConstraints" in note
    assert read_pins(f"trtexec --onnx=m.onnx {LP}a:fp16 --precisionConstraints=obey").notes == ()


def test_a_second_star_is_a_letter() -> None:
    view = GraphView.of(model_from_proto(chain()))
    _, (note,) = with_layer_pins(view, make_plan(view), parse_pins(f"{LP}*m.*:fp32"))
    assert not note.known
    assert "first `*`" in note.note


def test_options_without_pins_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"neither --layerPrecisions nor --layer-precisions"):
        parse_pins("--onnx=m.onnx --int8")


REAL = {
    "commented.txt": [(M0, "fp16")],
    "continued.txt": [("/cost/Unsqueeze", "fp16"), ("/cost/Conv", "fp16")],
    "cudla_quotes_inside.txt": [(M0, "fp16"), (M1, "fp16"), (M2, "fp16")],
    "order.txt": [(M0, "int8"), ("*", "fp32")],
    "output_types_only.txt": "types of outputs alone",
    "parser_names.txt": [("/Cast_2", "fp32"), ("/Reciprocal", "fp32"),
                         ("ONNXTRT_Broadcast_236", "fp32")],
    "polygraphy_commas.txt": [("Conv_0", "fp32"), ("Conv_1", "fp32")],
    "polygraphy_words.txt": [("Add", "fp16"), ("Sub", "fp32")],
    "quoted_whole.txt": [("*", "fp32"), ("/model.22/dfl/Softmax", "fp16")],
    "two_commands.txt": "which command",
    "two_stars.txt": [("*softmax*", "fp32"), ("*norm*", "fp32")],
    "wildcard_and_name.txt": [(M0, "int8"), ("*", "fp32")],
}  # fmt: skip


@realdata.needs_data
@pytest.mark.parametrize("name", REAL)
def test_pins_as_they_stand_in_public_scripts(name: str) -> None:
    text, expected = realdata.trace("pins", name).read_text(), REAL[name]
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            parse_pins(text)
    else:
        assert [(pin.layer, pin.precision) for pin in parse_pins(text)] == expected


def written(folder: Path, pins: str) -> tuple[Path, Path, Path]:
    onnx.save(chain(), folder / "m.onnx")
    scales = {"images": 0.02, **{f"{name}_output_0": 0.01 + k for k, name in enumerate(NODES)}}
    text = dump_cache(Cache("TRT-8600-EntropyCalibration2", scales))
    (folder / "c.cache").write_text(text)
    (folder / "pins.txt").write_text(pins)
    return folder / "m.onnx", folder / "c.cache", folder / "pins.txt"


def test_a_pin_that_holds_for_nothing_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    files = written(tmp_path, f"{LP}{M0}:fp32,ONNXTRT_Broadcast_236:fp32")
    with pytest.raises(ConfigError, match=r"1 of 2 pins hold for nothing.*Broadcast.*rank of the"):
        migrate_files(*files)
    _, found = migrate_files(*files, allow_missing=True)
    assert found.plan.pinned == (M0,)
