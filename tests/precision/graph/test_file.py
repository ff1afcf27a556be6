from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tinymodels
from onnx import numpy_helper
from realdata import DATA, needs_data

from trtune.configs.errors import ModelError, TrtuneError
from trtune.configs.files import hash_bytes
from trtune.datasets.batches import InputSpec
from trtune.precision.graph.file import load_model, model_from_proto, save_model
from trtune.precision.graph.view import GraphView

REAL = sorted((DATA / "models").glob("*.onnx")) if DATA else []


def write(path: Path, name: str = "conv_relu") -> bytes:
    data: bytes = tinymodels.MODELS[name]().SerializeToString()
    path.write_bytes(data)
    return data


def session(model: Path | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # with two, onnxruntime 1.23.0 itself gives now this, now that
    given = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def test_a_model_knows_its_file_inputs_and_outputs(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    data = write(path, "two_inputs")
    model = load_model(path)
    assert model.path == path
    assert model.sha256 == hash_bytes(data)
    assert model.inputs == (
        InputSpec("image", ("N", 3, 8, 8), "float32"),
        InputSpec("meta", ("N", 4), "float32"),
    )
    assert model.outputs == (InputSpec("logits", ("N", 10), "float32"),)
    assert (model.opset, model.notes, model.external_dir) == (17, (), None)


def test_initializers_are_not_inputs_and_int64_is_int64() -> None:
    spec = InputSpec("input", ("N", 3, 8, 8), "float32")
    assert model_from_proto(tinymodels.initializer_inputs()).inputs == (spec,)
    ids = model_from_proto(tinymodels.int64_input()).inputs
    assert ids == (InputSpec("ids", ("N", 6), "int64"),)
    assert model_from_proto(tinymodels.fixed_batch()).inputs[0].fixed_batch == 1


def test_an_unnamed_dimension_is_none() -> None:
    proto = tinymodels.conv_relu()
    proto.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    assert model_from_proto(proto).inputs[0].shape == (None, 3, 8, 8)


def test_an_upgrade_is_noted_and_shows_in_the_opset(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx", "opset11")
    model = load_model(tmp_path / "m.onnx")
    assert model.opset == 13
    assert "opset 11 upgraded to 13" in model.notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "no such model: .*m.onnx", id="missing"),
        pytest.param(b"", r"is empty \(0 bytes\)", id="empty"),
        pytest.param(b"PK\x03\x04....", "is not an ONNX file but a zip archive", id="torch file"),
        pytest.param(b"....TFL3....", "is not an ONNX file but a TensorFlow Lite", id="tflite"),
        pytest.param(b"ftrt....", "is not an ONNX file but a TensorRT engine", id="engine"),
        pytest.param(b"version https://git-lfs.github.com/spec", "a Git LFS pointer", id="lfs"),
        pytest.param(b"<!DOCTYPE html>", "is not an ONNX file but a web page", id="html"),
        pytest.param(b"hello, world", r"12 bytes that begin with b'hello, world'", id="text"),
        pytest.param(bytes(64), r"not an ONNX file: 64 bytes that begin with b'\\x00", id="zeros"),
        pytest.param(b"\x08\x08", r"not an ONNX file: 2 bytes", id="a protobuf without a graph"),
    ],
)
def test_what_is_not_onnx_is_said(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_model_is_said_to_be_truncated(tmp_path: Path, part: float) -> None:
    path = tmp_path / "m.onnx"
    data = write(path)
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ModelError, match=r"begins as an ONNX file but is truncated"):
        load_model(path)


def test_a_missing_model_lists_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "resnet.onnx")
    with pytest.raises(ModelError, match=r"no such model: .*; in that folder: resnet.onnx"):
        load_model(tmp_path / "resnet50.onnx")


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder"):
        load_model(tmp_path)


def test_a_model_that_the_system_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").symlink_to(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"cannot read .*m\.onnx: Too many levels"):
        load_model(tmp_path / "m.onnx")


def test_an_empty_graph(tmp_path: Path) -> None:
    proto = tinymodels.conv_relu()
    del proto.graph.node[:]
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="an empty graph"):
        load_model(tmp_path / "m.onnx")


def test_an_invalid_graph_names_the_file(tmp_path: Path) -> None:
    proto = tinymodels.conv_relu()
    proto.opset_import[0].version = 99
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"m\.onnx: the model uses opset 99"):
        load_model(tmp_path / "m.onnx")


def test_an_input_of_unknown_rank_is_refused() -> None:
    proto = tinymodels.nothing_quantizable()
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ModelError, match="input 'input' is a tensor of unknown rank"):
        model_from_proto(proto)


def test_an_output_without_a_shape_gets_the_inferred_one() -> None:
    proto = tinymodels.conv_relu()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    assert model_from_proto(proto).outputs == (InputSpec("logits", ("N", 10), "float32"),)


def external(folder: Path, name: str = "conv_relu", *, location: str = "weights.bin") -> Path:
    path = folder / "m.onnx"
    onnx.save_model(
        tinymodels.MODELS[name](),
        path,
        save_as_external_data=True,
        location=location,
        size_threshold=0,
    )
    return path


def test_small_external_weights_are_read_in(tmp_path: Path) -> None:
    path = external(tmp_path)
    model = load_model(path)
    inline = model_from_proto(tinymodels.conv_relu())
    assert model.external_dir is None
    assert model.proto == inline.proto
    assert model.sha256 != hash_bytes(path.read_bytes())


def test_the_hash_covers_the_external_weights(tmp_path: Path) -> None:
    path = external(tmp_path)
    before = load_model(path).sha256
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "weights.bin").write_bytes(data)
    assert load_model(path).sha256 != before


def test_large_external_weights_stay_outside(tmp_path: Path) -> None:
    path = external(tmp_path)
    model = load_model(path, load_limit=1000)
    assert model.external_dir == tmp_path.resolve()
    stored = {t.name: t.data_location for t in model.proto.graph.initializer}
    assert stored["conv2_w"] == onnx.TensorProto.EXTERNAL
    assert stored["conv2_b"] == onnx.TensorProto.DEFAULT
    graph, inline = GraphView.of(model), GraphView.of(model_from_proto(tinymodels.conv_relu()))
    assert graph.shapes == inline.shapes
    np.testing.assert_array_equal(graph.constant("conv2_w"), inline.constant("conv2_w"))


def test_large_external_weights_survive_an_upgrade_and_a_save(tmp_path: Path) -> None:
    net = tinymodels.Net(opset=11)
    x = net.op("ReduceSum", net.conv(net.input("input"), "conv", 3, 64), out="sum", axes=[2, 3])
    net.op("Squeeze", x, out="output", axes=[2, 3])
    proto = net.model({"output": ("N", 64)})
    inputs = tinymodels.feeds(proto)
    expected = tinymodels.run(proto, inputs)["output"]
    onnx.save_model(
        proto, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    model = load_model(tmp_path / "m.onnx", load_limit=0)
    assert model.opset == 13
    saved = tmp_path / "elsewhere" / "saved.onnx"
    save_model(model.proto, saved, model.external_dir)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["saved.onnx", "saved.onnx.data"]
    (found,) = session(saved).run(None, inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [0, 10_000])
def test_external_weights_that_state_no_length_end_with_the_tensor(
    tmp_path: Path, limit: int
) -> None:
    values = np.arange(4000, dtype=np.float32)
    (tmp_path / "w").write_bytes(values.tobytes())
    net = tinymodels.Net()
    net.op("Add", net.input("input", ("N", 2000)), "w", out="output")
    proto = net.model({"output": ("N", 2000)})
    tensor = proto.graph.initializer.add(name="w", data_type=1, dims=[2000])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    graph = GraphView.of(load_model(tmp_path / "m.onnx", load_limit=limit))
    np.testing.assert_array_equal(graph.constant("w"), values[:2000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"its weights are in 'weights.bin', which is not in"),
        ("truncated", r"its weights in 'weights.bin' are truncated: 100 bytes, but"),
    ],
)
def test_damaged_external_weights(tmp_path: Path, damage: str, message: str) -> None:
    path = external(tmp_path)
    weights = tmp_path / "weights.bin"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=rf"m\.onnx: {message}"):
        load_model(path)


def test_external_weights_may_not_climb_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    path = external(tmp_path / "inner")
    (tmp_path / "inner" / "weights.bin").rename(tmp_path / "weights.bin")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.external_data[0].value = "../weights.bin"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"'\.\./weights\.bin', outside the model's folder"):
        load_model(path)


def test_save_and_load_give_the_same_model(tmp_path: Path) -> None:
    model = model_from_proto(tinymodels.residual())
    save_model(model.proto, tmp_path / "saved.onnx")
    again = load_model(tmp_path / "saved.onnx")
    assert again.proto == model.proto
    assert again.notes == ()
    assert [p.name for p in tmp_path.iterdir()] == ["saved.onnx"]


def test_too_large_a_model_is_saved_with_its_weights_beside_it(tmp_path: Path) -> None:
    proto = tinymodels.conv_relu()
    untouched = tinymodels.conv_relu()
    path = tmp_path / "saved.onnx"
    save_model(proto, path, save_limit=1000)
    assert proto == untouched
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved.onnx", "saved.onnx.data"]
    assert path.stat().st_size < 5000
    onnx.checker.check_model(str(path), full_check=True)
    restored = load_model(path).proto
    assert {t.name: numpy_helper.to_array(t).tobytes() for t in restored.graph.initializer} == {
        t.name: numpy_helper.to_array(t).tobytes() for t in proto.graph.initializer
    }
    inputs = tinymodels.feeds(proto)
    (found,) = session(path).run(None, inputs)
    np.testing.assert_allclose(found, tinymodels.run(proto, inputs)["logits"], rtol=1e-4, atol=1e-5)


def test_saving_external_weights_needs_their_folder(tmp_path: Path) -> None:
    proto = onnx.load(external(tmp_path), load_external_data=False)
    with pytest.raises(ValueError, match="external_dir must say"):
        save_model(proto, tmp_path / "saved.onnx")


def test_weights_that_shrink_before_they_are_saved(tmp_path: Path) -> None:
    model = load_model(external(tmp_path), load_limit=0)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"weights\.bin ends within 'conv2_w'"):
        save_model(model.proto, tmp_path / "out" / "saved.onnx", model.external_dir)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(TrtuneError, match=r"cannot write .*nothing was left behind"):
        save_model(tinymodels.conv_relu(), blocked / "saved.onnx")
    assert list(tmp_path.iterdir()) == [blocked]


@needs_data
@pytest.mark.parametrize("path", REAL, ids=lambda path: getattr(path, "stem", "none"))
def test_real_models_compute_the_same(path: Path) -> None:
    model = load_model(path)
    rng = np.random.default_rng(0)
    feeds = {
        spec.name: rng.standard_normal([d if isinstance(d, int) else 2 for d in spec.shape]).astype(
            spec.dtype
        )
        for spec in model.inputs
    }
    original, normal = session(path), session(model.proto.SerializeToString())
    assert [i.name for i in original.get_inputs()] == [spec.name for spec in model.inputs]
    assert [o.name for o in original.get_outputs()] == [spec.name for spec in model.outputs]
    for want, got in zip(original.run(None, feeds), normal.run(None, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    graph = GraphView.of(model)
    assert len(graph.by_name) == len(model.proto.graph.node)
    assert set(graph.producer) <= set(graph.shapes)


@needs_data
def test_shape_computation_of_a_vision_transformer_is_recognised() -> None:
    assert DATA is not None
    graph = GraphView.of(load_model(DATA / "models" / "vit_cifar10.onnx"))
    kinds = {graph.by_name[name].op_type for name in graph.shape_nodes}
    assert "Shape" in kinds
    assert kinds.isdisjoint({"MatMul", "Conv", "Softmax", "LayerNormalization", "Transpose"})
    assert {n.name for n in graph.nodes if n.op_type == "Shape"} <= graph.shape_nodes
