"""The commands that need no run: what they show, what they write, and how they end."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest
import tinymodels
import yaml
from typer.testing import CliRunner, Result

import trtune
from trtune.cli.commands import app
from trtune.configs.load import load_config

COMMANDS = ["run", "calibrate", "build", "compare", "tune", "report", "inspect", "init", "doctor",
            "schema", "cache show", "cache convert", "cache diff"]  # fmt: skip
OLD, NEW = "TRT-8601-EntropyCalibration2", "TRT-101401-EntropyCalibration2"


def invoke(*args: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == status, result.output
    return result


def refused(*args: object) -> str:
    """The one message of a command that ends with 2, which is all it writes."""
    result = invoke(*args, status=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr.removeprefix("error: ").strip()


def cache_text(header: str, scales: dict[str, float]) -> str:
    lines = [f"{t}: {struct.unpack('>I', struct.pack('>f', s))[0]:x}" for t, s in scales.items()]
    return "\n".join([header, *lines]) + "\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def caches(here: Path) -> Path:
    (here / "a.cache").write_text(cache_text(OLD, {"x": 1.0, "a: b": 0.0, "only a": 0.5}))
    (here / "b.cache").write_text(cache_text(NEW, {"x": 1.5, "a: b": 0.0, "only b": 2.0}))
    return here


@pytest.fixture
def model(here: Path) -> Path:
    onnx.save(tinymodels.conv_relu(), here / "net.onnx")
    return here / "net.onnx"


class TestHelp:
    def test_every_command_is_listed(self) -> None:
        shown = invoke("--help").output
        for command in COMMANDS:
            assert re.search(rf"\b{command.split()[0]} ", shown), command

    @pytest.mark.parametrize("command", COMMANDS)
    def test_each_command_has_a_sentence_and_an_option_for_json(self, command: str) -> None:
        result = invoke(*command.split(), "-h")
        assert "--json" in result.output
        assert "--verbose" in result.output

    @pytest.mark.parametrize("command", COMMANDS[:5])
    def test_commands_on_a_config_have_the_common_options(self, command: str) -> None:
        shown = invoke(command, "--help").output
        assert "--set" in shown
        assert "--out" in shown

    def test_version(self) -> None:
        assert invoke("--version").stdout == f"trtune {trtune.__version__}\n"

    @pytest.mark.parametrize(
        "args",
        [
            pytest.param(["frobnicate"], id="no such command"),
            pytest.param(["run"], id="no config"),
            pytest.param(["run", "c.yaml", "--frobnicate"], id="no such option"),
            pytest.param(["cache", "convert", "a.cache", "-o", "b.cache"], id="no --to"),
        ],
    )
    def test_a_command_line_that_is_wrong_ends_with_2(self, args: list[str]) -> None:
        result = invoke(*args, status=2)
        assert result.stdout == ""
        assert "Usage: " in result.stderr


class TestConfigErrors:
    @pytest.mark.parametrize("command", ["run", "calibrate", "build", "compare", "tune"])
    def test_no_such_config(self, here: Path, command: str) -> None:
        (here / "modell.yaml").write_text("version: 1\n")
        assert refused(command, "model.yaml") == (
            "model.yaml: no such config file; did you mean 'modell.yaml'?"
        )

    def test_every_problem_has_a_line(self, model: Path) -> None:
        Path("c.yaml").write_text(
            "version: 1\nname: n\nmodel: {path: net.onnx}\n"
            "data: {calibration: {source: arrays, path: a.npz}}\ncalibration: {metod: mse}\n"
            "backend: []\n"
        )
        problems = refused("run", "c.yaml").splitlines()
        assert [problem.split(":")[2].strip() for problem in problems] == [
            "calibration.metod",
            "backend",
        ]
        assert problems[0].endswith("unknown key; did you mean 'method'?")

    def test_a_device_is_a_key_of_the_config(self, model: Path) -> None:
        invoke("init", model)
        assert "runtime.device" in refused("run", "net.yaml", "--device", "gpu")

    def test_an_override_is_named(self, model: Path) -> None:
        invoke("init", model)
        assert "calibration.method" in refused("run", "net.yaml", "--set", "calibration.method=mes")
        assert refused("run", "net.yaml", "--set", "nothing").startswith("--set nothing")


class TestCache:
    def test_show(self, caches: Path) -> None:
        shown = invoke("cache", "show", "a.cache").stdout
        assert "EntropyCalibration2 of TensorRT 8.6.1" in shown
        assert re.search(r"x +1 +127\b", shown)
        assert re.search(r"only a +0\.5 +63\.5\b", shown)
        assert "1 tensor with scale 0" in shown

    def test_show_as_json(self, caches: Path) -> None:
        assert json.loads(invoke("cache", "show", "a.cache", "--json").stdout) == {
            "header": OLD,
            "version": [8, 6, 1],
            "algorithm": "EntropyCalibration2",
            "scales": {"x": 1.0, "a: b": 0.0, "only a": 0.5},
        }

    def test_tensors_without_a_range_are_shown_and_kept(self, caches: Path) -> None:
        text = (caches / "a.cache").read_text() + "mask: 7f800000\r\n"
        (caches / "a.cache").write_bytes(text.encode())
        shown = invoke("cache", "show", "a.cache").stdout
        assert re.search(r"mask .*no range", shown)
        assert "1 tensor without a range" in shown
        value = json.loads(invoke("cache", "show", "a.cache", "--json").stdout)
        assert value["no_range"] == ["mask"]
        invoke("cache", "convert", "a.cache", "--to", "10.14.1", "-o", "c.cache")
        assert b"mask: 7f800000" in Path("c.cache").read_bytes()

    def test_converting_for_tensorrt_11_warns_that_nothing_reads_it(self, caches: Path) -> None:
        result = invoke("cache", "convert", "a.cache", "--to", "11.1.0", "-o", "c.cache")
        assert "has no calibrators" in result.stderr
        assert "trtune migrate" in " ".join(result.stderr.split())

    def test_a_malformed_line_is_quoted_with_its_number(self, caches: Path) -> None:
        with (caches / "a.cache").open("a") as file:
            file.write("y 3f800000\n")
        assert refused("cache", "show", "a.cache") == (
            "a.cache: line 5: expected '<tensor>: <1 to 8 hex digits>', found 'y 3f800000'"
        )

    def test_no_such_cache(self, here: Path) -> None:
        assert refused("cache", "show", "x.cache") == "no such calibration cache: x.cache"

    def test_diff_shows_missing_tensors_first_and_ends_with_1(self, caches: Path) -> None:
        shown = invoke("cache", "diff", "a.cache", "b.cache", status=1).stdout
        assert f"headers: {OLD} and {NEW}" in shown
        assert "3 of 4 tensors differ" in shown
        assert re.search(
            r"only a +0\.5 +missing.*only b +missing +2.*x +1 +1\.5 +1\.5", shown, re.S
        )

    def test_equal_scales_under_two_headers_end_with_0(self, caches: Path) -> None:
        (caches / "b.cache").write_text((caches / "a.cache").read_text().replace(OLD, NEW))
        shown = invoke("cache", "diff", "a.cache", "b.cache").stdout
        assert "headers: " in shown
        assert "the scales are equal: 3 tensors" in shown

    def test_diff_as_json_has_no_number_that_json_lacks(self, caches: Path) -> None:
        (caches / "a.cache").write_text(cache_text(OLD, {"x": 0.0}))
        (caches / "b.cache").write_text(cache_text(OLD, {"x": 1.0}))
        found = json.loads(invoke("cache", "diff", "a.cache", "b.cache", "--json", status=1).stdout)
        assert found["differences"] == [{"tensor": "x", "a": 0.0, "b": 1.0, "ratio": "Infinity"}]
        assert "∞" in invoke("cache", "diff", "a.cache", "b.cache", status=1).stdout

    def test_diff_of_a_file_that_is_no_cache_ends_with_2(self, caches: Path) -> None:
        (caches / "b.cache").write_text("hello\n")
        assert "this is not a TensorRT calibration cache" in refused(
            "cache", "diff", "a.cache", "b.cache"
        )

    def test_convert_changes_the_header_only(self, caches: Path) -> None:
        result = invoke("cache", "convert", "a.cache", "--to", "10.14.1", "-o", "new/c.cache")
        assert result.stdout == f"wrote new/c.cache with the header {NEW}\n"
        old = (caches / "a.cache").read_text()
        assert (caches / "new" / "c.cache").read_text() == old.replace(OLD, NEW)

    def test_convert_overwrites_only_by_force(self, caches: Path) -> None:
        before = (caches / "b.cache").read_text()
        convert = ("cache", "convert", "a.cache", "--to", "10.14.1", "-o", "b.cache")
        assert refused(*convert) == (
            "b.cache is there already; --force overwrites it, -o names another file"
        )
        assert (caches / "b.cache").read_text() == before
        invoke(*convert, "--force")
        assert (caches / "b.cache").read_text().startswith(f"{NEW}\nx: 3f800000\n")

    def test_convert_needs_a_version(self, caches: Path) -> None:
        convert = ("cache", "convert", "a.cache", "-o", "c.cache", "--to")
        assert refused(*convert, "ten") == (
            "'ten' is not a TensorRT version; write it as 10.14.1 or 8.6.1"
        )
        assert not (caches / "c.cache").exists()


class TestInspect:
    def test_what_it_shows(self, model: Path) -> None:
        shown = invoke("inspect", "net.onnx").stdout
        assert "net.onnx  opset 17" in shown
        assert re.search(r"input +input +float32 +N x 3 x 8 x 8", shown)
        assert re.search(r"output +logits +float32 +N x 10", shown)
        assert "Conv (2), Relu (2)" in shown
        assert "3 of 3 weighted nodes can run in INT8" in shown
        assert re.search(r"n_conv1 +Conv +int8 +default +N x 16 x 8 x 8 +27\.6 k +448", shown)
        assert "n_relu1" not in shown

    def test_verbose_shows_every_node(self, model: Path) -> None:
        assert re.search(r"n_relu1 +Relu ", invoke("inspect", "net.onnx", "-v").stdout)

    def test_reasons_and_problems(self, here: Path) -> None:
        onnx.save(tinymodels.attention(), here / "net.onnx")
        shown = invoke("inspect", "net.onnx").stdout
        assert re.search(r"n_scores +MatMul +fp32 +its weights are computed at run time", shown)
        onnx.save(tinymodels.quantized(), here / "net.onnx")
        shown = invoke("inspect", "net.onnx").stdout
        assert "3 Q/DQ nodes already in the graph" in shown
        assert "• already quantized: 3 (n_x_q, n_x_dq, n_w)" in shown

    def test_notes_say_what_normalising_changed(self, here: Path) -> None:
        onnx.save(tinymodels.opset11(), here / "net.onnx")
        assert "Notes\n• " in invoke("inspect", "net.onnx").stdout

    @pytest.mark.parametrize("name", sorted(tinymodels.MODELS))
    def test_every_model_is_shown_and_is_json(self, here: Path, name: str) -> None:
        onnx.save(tinymodels.MODELS[name](), here / "net.onnx")
        assert "weighted node" in invoke("inspect", "net.onnx").stdout
        found = json.loads(invoke("inspect", "net.onnx", "--json").stdout)
        assert found["path"] == "net.onnx"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            pytest.param(None, "no such model: net.onnx", id="no such model"),
            pytest.param(b"", "net.onnx is empty (0 bytes)", id="empty"),
            pytest.param(b"hello, world", "net.onnx is not an ONNX file: 12 bytes", id="text"),
            pytest.param(b"ftrt\0\0", "net.onnx is a plan of TensorRT cut off", id="engine"),
        ],
    )
    def test_a_file_that_is_no_model(self, here: Path, content: bytes | None, message: str) -> None:
        if content is not None:
            (here / "net.onnx").write_bytes(content)
        assert refused("inspect", "net.onnx").startswith(message)

    def test_a_truncated_model(self, model: Path) -> None:
        model.write_bytes(model.read_bytes()[:-100])
        assert "is truncated or damaged" in refused("inspect", "net.onnx")

    def test_an_engine_plan_cut_off_is_no_plan(self, here: Path) -> None:
        (here / "net.plan").write_bytes(b"ftrt")
        assert "cut off after 4 of its header's" in refused("inspect", "net.plan")


class TestInit:
    def test_the_config_names_the_model_from_where_it_stands(self, model: Path) -> None:
        result = invoke("init", "net.onnx", "-o", "configs/mine.yaml")
        assert result.stdout == (
            "wrote configs/mine.yaml; fill in data.calibration.path, "
            "then: trtune run configs/mine.yaml\n"
        )
        written = yaml.safe_load(Path("configs/mine.yaml").read_text())
        assert written["model"]["path"] == "../net.onnx"

    def test_by_default_it_stands_in_the_current_folder(self, model: Path) -> None:
        (model.parent / "models").mkdir()
        model.rename("models/net.onnx")
        invoke("init", "models/net.onnx")
        assert yaml.safe_load(Path("net.yaml").read_text())["model"]["path"] == "models/net.onnx"

    @pytest.mark.parametrize("name", ["conv_relu", "two_inputs", "int64_input", "fixed_batch"])
    def test_it_loads_once_the_data_is_there(self, here: Path, name: str) -> None:
        onnx.save(tinymodels.MODELS[name](), here / "net.onnx")
        invoke("init", "net.onnx")
        text = Path("net.yaml").read_text()
        assert text.count("PATH/TO/YOUR/DATA") == 1
        (here / "data").mkdir()
        (here / "data.npz").write_bytes(b"")
        Path("net.yaml").write_text(text.replace("PATH/TO/YOUR/DATA", "data"))
        assert load_config("net.yaml").model.path == str(here / "net.onnx")

    def test_before_that_the_message_names_the_key(self, model: Path) -> None:
        invoke("init", "net.onnx")
        assert "data.calibration.path: no such folder" in refused("run", "net.yaml")

    def test_it_overwrites_only_by_force(self, model: Path) -> None:
        Path("net.yaml").write_text("mine")
        assert refused("init", "net.onnx") == (
            "net.yaml is there already; --force overwrites it, -o names another file"
        )
        assert Path("net.yaml").read_text() == "mine"
        invoke("init", "net.onnx", "--force")
        assert "version: 1" in Path("net.yaml").read_text()

    def test_a_folder_is_no_file(self, model: Path) -> None:
        assert refused("init", "net.onnx", "-o", ".") == ". is a folder; give a file name"

    def test_as_json(self, model: Path) -> None:
        assert json.loads(invoke("init", "net.onnx", "--json").stdout) == {"config": "net.yaml"}


class TestSchema:
    def test_it_is_json_and_accepts_what_init_writes(self, model: Path) -> None:
        schema: dict[str, Any] = json.loads(invoke("schema").stdout)
        jsonschema.Draft202012Validator.check_schema(schema)
        invoke("init", "net.onnx")
        jsonschema.validate(yaml.safe_load(Path("net.yaml").read_text()), schema)

    def test_init_names_the_schema_that_it_writes_beside_the_config(self, model: Path) -> None:
        invoke("init", "net.onnx", "-o", "configs/net.yaml")
        first = Path("configs/net.yaml").read_text().splitlines()[0]
        place = Path("configs") / first.partition("# yaml-language-server: $schema=")[2]
        written = json.loads(place.read_text("utf-8"))
        assert written == json.loads(invoke("schema").stdout)
        assert written["$id"] == "urn:trtune:config:1"

    def test_json_changes_nothing(self) -> None:
        assert invoke("schema", "--json").stdout == invoke("schema").stdout


def python_m(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trtune", *args], cwd=cwd, capture_output=True, text=True
    )


class TestProgram:
    def test_the_module_is_the_program(self, here: Path) -> None:
        done = python_m("--version", cwd=here)
        assert (done.returncode, done.stdout) == (0, f"trtune {trtune.__version__}\n")
        assert done.stderr == ""

    def test_wrong_input_is_one_line_and_2(self, here: Path) -> None:
        done = python_m("inspect", "net.onnx", cwd=here)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: no such model: net.onnx\n"

    def test_json_is_all_there_is_on_stdout(self, model: Path) -> None:
        done = python_m("inspect", "net.onnx", "--json", "-v", cwd=model.parent)
        assert done.returncode == 0
        assert json.loads(done.stdout)["opset"] == 17

    def test_help_loads_nothing_heavy(self, here: Path) -> None:
        program = (
            "import sys; from typer.testing import CliRunner; from trtune.cli.commands import app\n"
            "assert CliRunner().invoke(app, ['run', '--help']).exit_code == 0\n"
            "heavy = {'numpy', 'onnx', 'onnxruntime', 'pandas', 'polygraphy', 'numba'}\n"
            "print(sorted(heavy & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=here, capture_output=True, text=True, check=True
        )
        assert done.stdout == "[]\n"

    def test_a_reader_that_leaves_early_is_no_bug(self, model: Path) -> None:
        program = f"{sys.executable} -m trtune schema | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(
            ["bash", "-c", program], cwd=model.parent, capture_output=True, text=True
        )
        assert "bug" not in done.stderr
        assert "Traceback" not in done.stderr


class TestOrder:
    def test_commands_stand_in_the_order_of_their_use(self) -> None:
        shown = invoke("--help").output
        order = ["init", "inspect", "run", "calibrate", "build", "compare", "tune", "report",
                 "migrate", "qdq", "cache", "doctor", "schema"]  # fmt: skip
        places = [re.search(rf"^\W*{name}\s{{2,}}", shown, re.M) for name in order]
        assert None not in places
        starts = [place.start() for place in places if place is not None]
        assert starts == sorted(starts)

    def test_completion_can_be_installed(self) -> None:
        assert "--install-completion" in invoke("--help").output


class TestModelInPlaceOfAConfig:
    @pytest.mark.parametrize("command", ["run", "calibrate", "build", "compare", "tune"])
    def test_it_says_init(self, model: Path, command: str) -> None:
        assert refused(command, "net.onnx") == (
            "net.onnx is a model, and this command takes a config; `trtune init net.onnx` writes "
            f"one, then: trtune {command} net.yaml"
        )

    def test_a_config_that_is_there_is_named(self, model: Path) -> None:
        invoke("init", "net.onnx")
        assert refused("run", "net.onnx").endswith("takes a config; then: trtune run net.yaml")


class TestJson:
    def test_a_failure_is_an_object_with_the_error(self, here: Path) -> None:
        result = invoke("inspect", "net.onnx", "--json", status=2)
        assert json.loads(result.stdout) == {"error": "no such model: net.onnx", "exit_status": 2}
        assert result.stderr == "error: no such model: net.onnx\n"
