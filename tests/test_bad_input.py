"""What a user can get wrong: for each the class of the error and what it says."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tinymodels
from numpy.typing import NDArray
from tinyproject import config_of, write_project

from trtune.configs.errors import (
    ConfigError,
    DataError,
    InputError,
    ModelError,
    TrtuneError,
)
from trtune.run.pipeline import calibrate, run, run_folder

Change = Callable[[NDArray[Any]], NDArray[Any]]
TOP1 = "precision.target={metric: top1, min: 0.1}"


def arrays(part: str = "calibration", **changes: Change | None) -> Callable[[Path], None]:
    """Changes arrays of `part`, by name; None removes one."""

    def harm(folder: Path) -> None:
        rows = dict(np.load(folder / f"{part}.npz"))
        for name, change in changes.items():
            array = rows.pop(name)
            if change is not None:
                rows[name] = change(array)
        np.savez(folder / f"{part}.npz", **rows)

    return harm


def at(row: int, value: float) -> Change:
    """One value of one row replaced."""

    def change(array: NDArray[Any]) -> NDArray[Any]:
        array.reshape(len(array), -1)[row, -1] = value
        return array

    return change


def renamed(folder: Path) -> None:
    rows = np.load(folder / "calibration.npz")
    np.savez(folder / "calibration.npz", image=rows["input"], extra=rows["input"])


def nothing(folder: Path) -> None:
    """Leave it as it is."""


def cut(name: str, end: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:end]) and None


@pytest.mark.parametrize(
    ("harm", "overrides", "kind", "message"),
    [
        pytest.param(
            lambda folder: (folder / "net.onnx").unlink(), [], ConfigError,
            "{folder}/tiny.yaml:4: model.path: no such file: {folder}/net.onnx",
            id="no such model",
        ),
        pytest.param(
            lambda folder: (folder / "net.onnx").write_text("not a model at all"), [], ModelError,
            "{folder}/net.onnx is not an ONNX file: 18 bytes that begin with b'not a model at a'",
            id="not an ONNX file",
        ),
        pytest.param(
            cut("net.onnx", 12000), [], ModelError,
            "{folder}/net.onnx begins as an ONNX file but is truncated or damaged (12000 bytes); "
            "export or copy it again",
            id="a truncated ONNX file",
        ),
        pytest.param(
            cut("calibration.npz", 12000), [], DataError,
            "{folder}/calibration.npz cannot be read as .npz or .npy: ",
            id="truncated data",
        ),
        pytest.param(
            renamed, [], DataError,
            "{folder}/calibration.npz has nothing for the model's input 'input'; found 'image', "
            "'extra'; name the array in `inputs: {{input: ARRAY}}`",
            id="no array for the input",
        ),
        pytest.param(
            nothing, ["data.calibration.inputs={inputs: input}"], DataError,
            "`inputs` names 'inputs', which is no input of the model; did you mean 'input'?; its "
            "inputs are 'input'",
            id="an input that the model has not",
        ),
        pytest.param(
            arrays(input=lambda array: array[:, :, :6]), [], DataError,
            "input 'input' takes N x 3 x 8 x 8, {folder}/calibration.npz gives 1 x 3 x 6 x 8; see "
            "`preprocess` (resize, crop, channels)",
            id="wrong shape",
        ),
        pytest.param(
            arrays(input=lambda array: array[:, 0]), [], DataError,
            "input 'input' takes N x 3 x 8 x 8, {folder}/calibration.npz gives 1 x 8 x 8; the "
            "first axis must be the rows, one a sample",
            id="a dimension too few",
        ),
        pytest.param(
            arrays("evaluation", input=lambda array: array.transpose(0, 2, 3, 1)), [], DataError,
            "input 'input' takes N x 3 x 8 x 8, {folder}/evaluation.npz gives 1 x 8 x 8 x 3; it "
            "would fit as NCHW (`preprocess.layout`)",
            id="wrong layout of the evaluation data",
        ),
        pytest.param(
            arrays(input=lambda array: (array * 10).astype(np.int32)), [], DataError,
            "input 'input' takes float32, {folder}/calibration.npz has int32; convert the array",
            id="wrong dtype",
        ),
        pytest.param(
            arrays(input=lambda array: array.astype(np.uint8)), [], DataError,
            "input 'input' takes float32, {folder}/calibration.npz has uint8; pictures need "
            "`preprocess` (scale, mean, std, layout)",
            id="pictures without preprocessing",
        ),
        pytest.param(
            arrays(input=lambda a: a[:0], labels=lambda a: a[:0]), [], DataError,
            "{folder}/calibration.npz is empty: there is nothing to feed the model with",
            id="empty data",
        ),
        pytest.param(
            nothing, ["data.calibration.skip=24"], DataError,
            "no rows are left of {folder}/calibration.npz: it has 24, and `skip` leaves out 24",
            id="nothing left of the data",
        ),
        pytest.param(
            arrays("evaluation", labels=None), [TOP1], DataError,
            "metric 'top1' needs labels, and the data has none (first item: 0); set `labels` (a "
            "CSV with the columns file,label, folders named after classes, or an array 'labels'), "
            "or use the metric sqnr_db or cosine",
            id="labels missing",
        ),
        pytest.param(
            nothing, [TOP1, "data.evaluation.labels=null"], ConfigError,
            "--set: precision.target.metric: top1 needs labels, but data.evaluation.labels is "
            "null; give labels, or use sqnr_db or cosine with min",
            id="labels switched off",
        ),
        pytest.param(
            arrays("evaluation", labels=lambda array: array + 10), [TOP1], DataError,
            "label {first} of 0 is out of range: the model has 10 classes, 0 to 9 (8 of 8 labels "
            "are out of range)",
            id="labels out of range",
        ),
        pytest.param(
            arrays("evaluation", labels=at(13, -1)), [TOP1], DataError,
            "label -1 of 13 is out of range: the model has 10 classes, 0 to 9 (1 of 8 labels are "
            "out of range)",
            id="one label out of range, late in the data",
        ),
        pytest.param(
            arrays("evaluation", labels=lambda array: array + 0.5), [TOP1], DataError,
            "metric 'top1' needs class indices, whole numbers, and the labels are float64 "
            "(first: 5.5 of 0)",
            id="labels that are no class indices",
        ),
        pytest.param(
            nothing, ["precision.pin={n_konv1: fp32}"], ConfigError,
            "precision.pin: 'n_konv1' matches none of the 7 nodes; did you mean 'n_conv1' or "
            "'n_conv2'? (`trtune inspect MODEL` lists them)",
            id="an unknown pin",
        ),
        pytest.param(
            nothing, ["precision.pin={'op:Konv': fp32}"], ConfigError,
            "precision.pin: 'op:Konv' matches none of the 7 nodes; did you mean 'Conv'? (`trtune "
            "inspect MODEL` lists them)",
            id="an unknown operator",
        ),
        pytest.param(
            nothing, ["calibration.method=entrpy"], ConfigError,
            "--set: calibration.method: 'entrpy' is not one of entropy, entropy-s7310, "
            "percentile, mse, max, auto; did you mean 'entropy'?",
            id="an unknown method",
        ),
        pytest.param(
            arrays(input=at(11, np.nan)), [], DataError,
            "{folder}/calibration.npz, item 11: NaN in 1 of 192 values for input 'input' "
            "(float32); repair or leave out that item",
            id="NaN in a calibration picture",
        ),
        pytest.param(
            arrays("evaluation", input=at(13, -np.inf)), [], DataError,
            "{folder}/evaluation.npz, item 13: Inf in 1 of 192 values for input 'input' "
            "(float32); repair or leave out that item",
            id="infinity in an evaluation picture",
        ),
        pytest.param(
            nothing,
            ["backends=[{name: onnxruntime, lowering: deploy}]", "precision.default=fp16"],
            ConfigError,
            "backends.0.lowering: deploy runs in int8 and fp32 alone, and precision.default is "
            "fp16; use emulate, or fp32 there",
            id="a precision that a lowering lacks",
        ),
        pytest.param(
            nothing, ["precision.default=qat"], ModelError,
            "{folder}/net.onnx holds no QuantizeLinear or DequantizeLinear, so there is nothing to "
            "import; use `precision.default: int8` to quantize it",
            id="a model without quantization, to be imported",
        ),
        pytest.param(
            nothing, ["precision.target={metric: 'absent:f', min: 1}"], DataError,
            "cannot import 'absent' (from 'absent:f', looked in sys.path first): "
            "ModuleNotFoundError: No module named 'absent'",
            id="a metric that cannot be imported",
        ),
    ],
)  # fmt: skip
def test_the_error_says_what_is_wrong(
    tmp_path: Path,
    harm: Callable[[Path], None],
    overrides: list[str],
    kind: type[InputError],
    message: str,
) -> None:
    folder = write_project(tmp_path)
    first = int(np.load(folder / "evaluation.npz")["labels"][0]) + 10
    harm(folder)
    with pytest.raises(TrtuneError) as failure:
        run(config_of(folder, *overrides), out=folder / "runs")
    wanted = message.format(folder=folder, first=first)
    found = str(failure.value)
    assert (found[: len(wanted)] if wanted.endswith(": ") else found) == wanted
    assert type(failure.value) is kind
    assert failure.value.exit_code == 2
    assert not list(folder.rglob("calibration.cache"))
    assert not [p for p in folder.rglob("*") if p.name.startswith((".writing-", ".tuning"))]


def exploding(*, squashed: bool) -> onnx.ModelProto:
    """A network that starts with Exp, so that a large input overflows."""
    net = tinymodels.Net()
    x = net.op("Exp", net.input("input"), out="exp")
    x = net.op("Relu", net.conv(x, "conv1", 3, 8), out="relu1")
    if squashed:
        x = net.op("Tanh", x, out="tanh")
    return net.head(x, 8)


class TestOverflow:
    def test_a_calibration_picture_and_the_tensor_are_named(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, exploding(squashed=True), labels=False)
        arrays(input=at(11, 200.0))(folder)
        config = config_of(folder)
        with pytest.raises(ModelError) as failure:
            run(config, out=folder / "runs")
        assert str(failure.value) == (
            "tensor 'exp' holds infinity for picture '11', and not for all pictures; the FP32 "
            "model itself overflows there, so no scale can be right: check the preprocessing of "
            "that picture"
        )
        assert list((folder / "runs").iterdir()) == []  # nothing is left that looks like a run

    def test_one_of_the_first_pictures_is_found_by_the_gate(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, exploding(squashed=False), labels=False)
        arrays(input=at(3, 200.0))(folder)
        with pytest.raises(ModelError) as failure:
            run(config_of(folder), out=folder / "runs")
        assert str(failure.value).startswith("picture '3' gives ")
        assert "in tensor 'logits' of the FP32 model" in str(failure.value)

    def test_an_evaluation_picture_and_the_output_are_named(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path, exploding(squashed=False), labels=False)
        arrays("evaluation", input=at(13, 200.0))(folder)
        with pytest.raises(
            TrtuneError, match=r"^the FP32 model's output 'logits' holds .* for '13'"
        ):
            run(config_of(folder), out=folder / "runs")


class TestUserCode:
    def test_a_data_function_that_fails_says_in_which_batch(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        (folder / "mine.py").write_text(
            "import numpy as np\n"
            "def rows():\n"
            "    yield {'input': np.zeros((4, 3, 8, 8), 'float32')}\n"
            "    raise RuntimeError('the camera is off')\n"
        )
        config = config_of(
            folder, f"data.calibration={{source: python, path: '{folder}/mine.py:rows'}}",
            f"data.evaluation={{source: arrays, path: '{folder}/evaluation.npz'}}",
        )  # fmt: skip
        with pytest.raises(DataError) as failure:
            run(config, out=folder / "runs")
        assert str(failure.value) == (
            f"{folder}/mine.py:rows failed in batch 1: RuntimeError: the camera is off"
        )
        assert isinstance(failure.value.__cause__, RuntimeError)

    def test_a_metric_that_fails_says_on_which_batch(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        (folder / "mine.py").write_text("def lost(outputs, batch):\n    return outputs['scores']\n")
        config = config_of(folder, f"precision.target={{metric: '{folder}/mine.py:lost', min: 1}}")
        with pytest.raises(
            TrtuneError, match=r"failed on the batch that starts with '0': KeyError"
        ):
            run(config, out=folder / "runs")


def leftovers(folder: Path) -> list[Path]:
    """Half-written things, anywhere below."""
    return [p for p in folder.rglob("*") if p.name.startswith((".writing-", ".tuning"))]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a file system here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


class TestFileSystem:
    def test_a_place_below_a_file(self, tmp_path: Path) -> None:
        folder = write_project(tmp_path)
        (folder / "runs").write_text("")
        config = config_of(folder)
        with pytest.raises(TrtuneError) as failure:
            run(config, out=folder / "runs")
        assert str(failure.value) == (
            f"cannot write to {run_folder(config, folder / 'runs')}: Not a directory; choose "
            "another place with --out"
        )
        assert failure.value.exit_code == 1

    def test_a_read_only_one(self, tmp_path: Path, small_disk: Path) -> None:
        folder = write_project(tmp_path / "project")
        remount = ["mount", "-o", "remount,ro", str(small_disk)]
        subprocess.run(remount, check=True, capture_output=True)
        config = config_of(folder)
        with pytest.raises(TrtuneError) as failure:
            run(config, out=small_disk)
        assert str(failure.value) == (
            f"cannot write to {run_folder(config, small_disk)}: Read-only file system; choose "
            "another place with --out"
        )
        assert list(small_disk.iterdir()) == []

    def test_one_that_becomes_read_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = write_project(tmp_path)

        def refuse(**where: object) -> str:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        config = config_of(folder)
        monkeypatch.setattr("tempfile.mkdtemp", refuse)
        with pytest.raises(TrtuneError) as failure:
            run(config, out=folder / "runs")
        place = run_folder(config, folder / "runs")
        assert str(failure.value) == (
            f"cannot write {place}/config.yaml: Read-only file system; nothing was left behind. "
            "Choose another place with --out, or free some space"
        )
        assert [p.name for p in place.iterdir()] == ["log.txt"]

    def test_a_disk_that_is_full(
        self, tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = write_project(tmp_path / "project")
        config = config_of(folder)
        with pytest.raises(TrtuneError) as failure:
            run(config, out=small_disk)
        assert str(failure.value).startswith(f"cannot write {run_folder(config, small_disk)}/")
        assert str(failure.value).endswith(
            ": No space left on device; nothing was left behind. Choose another place with --out, "
            "or free some space"
        )
        assert failure.value.exit_code == 1
        assert leftovers(small_disk) == []
        assert capsys.readouterr().err == ""
        subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
        assert run(config, out=small_disk).status == "met"

    def test_a_disk_that_is_full_from_any_write_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = write_project(tmp_path)
        config = config_of(folder)
        whole = run(config, out=folder / "whole")
        writes = [0]
        limit = [10**9]
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            writes[0] += 1
            if writes[0] > limit[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        monkeypatch.setattr("os.fsync", fsync)
        run(config, out=folder / "counted")
        total = writes[0]
        assert total > 10
        out = folder / "runs"
        for number in range(0, total, 2):
            writes[0], limit[0] = 0, number
            fresh = out / str(number)
            with pytest.raises(TrtuneError, match=r"^cannot write .*: No space left on device; "):
                run(config, out=fresh)
            assert leftovers(fresh) == []
        limit[0] = 10**9
        for number in range(0, total, 2):
            again = run(config, out=out / str(number))
            assert [v.sqnr_db for v in again.variants] == [v.sqnr_db for v in whole.variants]
            assert again.key == whole.key


def test_a_cache_that_cannot_be_written_is_not_there_by_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_project(tmp_path)
    config = config_of(folder)
    original = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        if path.name == "calibration.cache":
            original(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        with pytest.raises(TrtuneError, match=r"calibration\.cache: No space left on device"):
            calibrate(config, out=folder / "runs")
    place = run_folder(config, folder / "runs")
    assert not (place / "calibration.cache").exists()
    assert leftovers(folder) == []
    assert set(calibrate(config, out=folder / "runs").scales) >= {"input", "relu1", "flat"}
