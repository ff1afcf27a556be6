"""Reading config files: inheritance, variables, overrides, paths, and messages."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from trtune.configs.errors import ConfigError
from trtune.configs.load import (
    PRESETS,
    check_files,
    dump_config,
    json_schema,
    load_config,
    presets,
)
from trtune.configs.schema import Config

MINIMAL = """\
version: 1
name: digits
model:
  path: model.onnx
data:
  calibration:
    source: images
    path: pictures
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and pictures, and the current one, so that messages are short."""
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, text: str) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text), encoding="utf-8")
    return file


def load(text: str, *overrides: str, check: bool = True) -> Config:
    return load_config(write("c.yaml", text), overrides=overrides, check=check)


def error(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_minimal_file_loads(folder: Path) -> None:
    config = load(MINIMAL)
    assert config.name == "digits"
    assert config.model.path == str(folder / "model.onnx")
    assert config.data.evaluation.path == str(folder / "pictures")


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        pytest.param(
            "calibration: {metod: mse}",
            "c.yaml:9: calibration.metod: unknown key; did you mean 'method'?",
            id="misspelled key",
        ),
        pytest.param(
            "calibration: {method: entropi}",
            "c.yaml:9: calibration.method: 'entropi' is not one of entropy, entropy-s7310, "
            "percentile, "
            "mse, max, auto; did you mean 'entropy'?",
            id="misspelled choice",
        ),
        pytest.param(
            "calibration: {method: 3}",
            "c.yaml:9: calibration.method: 3 is not one of entropy, entropy-s7310, percentile, "
            "mse, "
            "max, auto",
            id="a choice of the wrong type",
        ),
        pytest.param(
            "target: {metric: top1, max_drop: 0.01}",
            "c.yaml:9: target: unknown key; did you mean 'precision.target'?",
            id="a key in the wrong place",
        ),
        pytest.param(
            "xyzzy: 1",
            "c.yaml:9: xyzzy: unknown key; there are only version, name, model, data, calibration, "
            "precision, outputs, compare, backends, runtime, report",
            id="a key like no other",
        ),
        pytest.param(
            "compare: {pictures: many}",
            "c.yaml:9: compare.pictures: expected a whole number, found 'many'",
            id="text for a number",
        ),
        pytest.param(
            "compare: {pictures: 1.5}",
            "c.yaml:9: compare.pictures: expected a whole number, found 1.5",
            id="a fraction for a whole number",
        ),
        pytest.param(
            "compare: {pictures: true}",
            "c.yaml:9: compare.pictures: expected a number, found true",
            id="true for a number",
        ),
        pytest.param(
            "compare: {pictures: 0}",
            "c.yaml:9: compare.pictures: expected at least 1, found 0",
            id="a number too small",
        ),
        pytest.param(
            "calibration: {percentile: 101}",
            "c.yaml:9: calibration.percentile: expected at most 100, found 101",
            id="a number too large",
        ),
        pytest.param(
            "calibration: {percentile: .nan}",
            "c.yaml:9: calibration.percentile: expected a finite number, found NaN",
            id="not a number",
        ),
        pytest.param(
            "calibration: {percentile: 50}",
            "c.yaml:9: calibration.percentile: expected more than 50, found 50",
            id="a number on the border",
        ),
        pytest.param(
            "compare: {alone: maybe}",
            "c.yaml:9: compare.alone: expected true or false, found 'maybe'",
            id="neither true nor false",
        ),
        pytest.param(
            "compare: {memory: 1GB}",
            "c.yaml:9: compare.memory: expected a size such as 4GiB, 512MiB or a number of bytes, "
            "found '1GB'",
            id="a size in a wrong unit",
        ),
        pytest.param(
            "calibration: entropy",
            "c.yaml:9: calibration: expected a mapping (`key: value`), found 'entropy'",
            id="text for a section",
        ),
        pytest.param(
            "precision: {pin: [conv]}",
            'c.yaml:9: precision.pin: expected a mapping (`key: value`), found ["conv"]',
            id="a list for pins",
        ),
        pytest.param(
            "precision: {pin: {features.0: fp31}}",
            "c.yaml:9: precision.pin.\"features.0\": 'fp31' is not one of int8, fp8, fp16, bf16, "
            "fp32; did "
            "you mean 'fp32'?",
            id="no such precision",
        ),
        pytest.param(
            "precision: {target: {metric: top_1, max_drop: 0.1}}",
            "c.yaml:9: precision.target.metric: 'top_1' is not one of top1, top5, ap, "
            "ap50, miou, sqnr_db, cosine, agreement, detection_agreement, pixel_agreement, "
            "token_agreement, next_token, perplexity or "
            "module:function; did you mean 'top1'?",
            id="no such metric",
        ),
        pytest.param(
            "precision: {target: {metric: top1, min: 84}}",
            "c.yaml:9: precision.target.min: a fraction from 0 to 1 (0.005 is half a point), "
            "found 84",
            id="points for fractions",
        ),
        pytest.param(
            "precision: {target: {max_drop: 0.1}}",
            "c.yaml:9: precision.target.metric: required, but not given: with labels: top1, top5, "
            "ap, ap50, miou (fractions), next_token, perplexity; against FP32: sqnr_db, cosine, "
            "agreement (of classes), detection_agreement, pixel_agreement, token_agreement; or a "
            "function or class of yours as module:name",
            id="a target without a metric",
        ),
        pytest.param(
            "backends:\n  - {name: onnxruntim}",
            "c.yaml:10: backends.0.name: 'onnxruntim' is not one of onnxruntime, tensorrt_rtx, "
            "tensorrt; did you mean 'onnxruntime'?",
            id="no such backend",
        ),
        pytest.param(
            "backends:\n  - {lowering: deploy}",
            "c.yaml:10: backends.0.name: required, but not given: which runtime",
            id="a backend without a name",
        ),
        pytest.param(
            "backends: [onnxruntime]",
            "c.yaml:9: backends.0: expected a mapping (`key: value`), found 'onnxruntime'",
            id="a bare backend",
        ),
        pytest.param(
            "backends:\n  - name: tensorrt\n    workspase: 4GiB",
            "c.yaml:11: backends.0.workspase: unknown key; did you mean 'workspace'?",
            id="misspelled key of a backend",
        ),
        pytest.param(
            "backends:\n  - name: onnxruntime\n    timing_cache: x",
            "c.yaml:11: backends.0.timing_cache: unknown key; there are only required, name, "
            "lowering, threads",
            id="a key of another backend",
        ),
        pytest.param(
            "report: {formats: html}",
            "c.yaml:9: report.formats: expected a list, found 'html'",
            id="text for a list",
        ),
        pytest.param(
            "report: {formats: [htm]}",
            "c.yaml:9: report.formats.0: 'htm' is not one of md, html, csv, json; did you mean "
            "'html'?",
            id="a wrong entry of a list",
        ),
        pytest.param(
            "calibration: {cache: 3}",
            "c.yaml:9: calibration.cache: expected text, found 3; put it in quotes",
            id="a number for text",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder: Path, added: str, expected: str) -> None:
    assert error(MINIMAL + added) == expected


def test_several_problems_come_in_the_order_of_the_file(folder: Path) -> None:
    text = (
        MINIMAL.replace("version: 1", "version: 2") + "calibration: {holdout: -1, metod: x}\nx: 1\n"
    )
    assert error(text).splitlines() == [
        "c.yaml:1: version: expected 1, found 2",
        "c.yaml:9: calibration.holdout: expected at least 1, found -1",
        "c.yaml:9: calibration.metod: unknown key; did you mean 'method'?",
        "c.yaml:10: x: unknown key; there are only version, name, model, data, calibration, "
        "precision, outputs, compare, backends, runtime, report",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param(
            "name: digits\n", "", "name: required, but not given: name of the run", id="name"
        ),
        pytest.param(
            "version: 1\n", "", "version: required, but not given: version of", id="version"
        ),
        pytest.param(
            "  path: model.onnx\n", "", "model: required, but not given: the netw", id="model"
        ),
        pytest.param(
            "images", "image", "data.calibration.source: 'image' is not one of", id="images"
        ),
        pytest.param(
            "digits", "a/b", "name: 'a/b' does not fit: name of the run and of its", id="slash"
        ),
        pytest.param(
            "digits", "1.5", "name: expected text, found 1.5; put it in quotes", id="number"
        ),
        pytest.param(
            "model.onnx", "''", "model.path: expected text that is not empty, found ''", id="''"
        ),
    ],
)
def test_what_is_missing_or_malformed_is_named_once(
    folder: Path, old: str, new: str, expected: str
) -> None:
    lines = error(MINIMAL.replace(old, new)).splitlines()
    assert [line.split(": ", 1)[1][: len(expected)] for line in lines] == [expected]


def test_what_evaluation_inherits_wrongly_is_reported_where_it_was_written(folder: Path) -> None:
    text = MINIMAL + "    batch: 0\n  evaluation: {skip: -1}\n  validation: {take: 0}\n"
    assert error(text).splitlines() == [
        "c.yaml:9: data.calibration.batch: expected at least 1, found 0",
        "c.yaml:10: data.evaluation.skip: expected at least 0, found -1",
        "c.yaml:11: data.validation.take: expected at least 1, found 0",
    ]


def test_evaluation_of_another_source_needs_its_own_path(folder: Path) -> None:
    found = error(MINIMAL + "  evaluation: {source: arrays}\n")
    assert found.startswith(
        "c.yaml:9: data.evaluation.path: required, but not given: folder or file"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "", "c.yaml: expected a mapping of keys such as `version: 1`; it is empty", id="0"
        ),
        pytest.param(
            "- a", 'c.yaml: expected a mapping of keys such as `version: 1`; found ["a"]', id="[]"
        ),
        pytest.param(
            "a: 1\na: 2", "c.yaml:2: a: this key is given twice (first on line 1)", id="twice"
        ),
    ],
)
def test_a_file_that_is_no_config(folder: Path, text: str, expected: str) -> None:
    assert error(text) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        pytest.param(
            "confg.yaml", "confg.yaml: no such config file; did you mean 'config.yaml'?", id="near"
        ),
        pytest.param(
            "no/where/c.yaml",
            "no/where/c.yaml: no such config file; there is no 'no' in .",
            id="dir",
        ),
        pytest.param(".", ".: is a folder, not a config file (it holds config.yaml)", id="folder"),
        pytest.param(
            "pictures", "pictures: is a folder, not a config file", id="folder without configs"
        ),
        pytest.param(
            "b.onnx", "b.onnx: not UTF-8 text (byte 1); is this a YAML file?", id="binary"
        ),
        pytest.param(
            "config.yaml/x", "config.yaml/x: cannot be read: Not a directory", id="below a file"
        ),
    ],
)
def test_a_config_that_cannot_be_read(folder: Path, path: str, expected: str) -> None:
    write("config.yaml", MINIMAL)
    (folder / "b.onnx").write_bytes(b"\x08\xff\xfe")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == expected


def test_a_byte_order_mark_is_no_part_of_the_first_key(folder: Path) -> None:
    Path("c.yaml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load_config("c.yaml").version == 1


def test_relative_paths_start_at_the_file_that_wrote_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        "base/base.yaml",
        """\
        model: {path: nets/m.onnx}
        data: {calibration: {source: images, path: pics, labels: ../labels.csv}}
        backends:
          - {name: tensorrt, timing_cache: timing.cache}
    """,
    )
    write(
        "sub/c.yaml",
        """\
        extends: ../base/base.yaml
        version: 1
        name: x
        data: {evaluation: {path: test}}
        calibration: {cache: old.cache}
    """,
    )
    monkeypatch.chdir(folder / "base")
    config = load_config("../sub/c.yaml", overrides=["data.evaluation.labels=l.csv"], check=False)
    assert config.model.path == str(folder / "base" / "nets" / "m.onnx")
    assert config.data.calibration.path == str(folder / "base" / "pics")
    assert config.data.calibration.labels == str(folder / "labels.csv")
    assert config.data.evaluation.path == str(folder / "sub" / "test")
    assert config.data.evaluation.labels == str(folder / "base" / "l.csv")
    assert config.calibration.cache == str(folder / "sub" / "old.cache")
    assert getattr(config.backends[0], "timing_cache") == str(folder / "base" / "timing.cache")  # noqa: B009


@pytest.mark.parametrize(
    ("section", "key", "expected"),
    [
        pytest.param(
            "{source: arrays, path: a.npz, labels: y}", "labels", "y", id="the name of an array"
        ),
        pytest.param(
            "{source: images, path: p, labels: auto}", "labels", "auto", id="auto is no file"
        ),
        pytest.param(
            "{source: idx, path: p, labels: y}", "labels", "HERE/y", id="idx labels are a file"
        ),
        pytest.param(
            "{source: python, path: 'm:f', labels: y}", "path", "m:f", id="an installed module"
        ),
        pytest.param(
            "{source: python, path: 'd/m.py:f'}", "path", "HERE/d/m.py:f", id="a Python file"
        ),
        pytest.param(
            "{source: python, path: 'own:f'}", "path", "HERE/own.py:f", id="a module beside it"
        ),
        pytest.param("{source: images, path: /abs/p}", "path", "/abs/p", id="absolute stays"),
        pytest.param("{source: images, path: a/../b/}", "path", "HERE/b", id="tidied up"),
        pytest.param("{source: images, path: ~/p}", "path", "HOME/p", id="home"),
    ],
)
def test_what_counts_as_a_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch, section: str, key: str, expected: str
) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    write("own.py", "")
    text = MINIMAL.split("data:")[0] + f"data: {{calibration: {section}}}\n"
    found = getattr(load(text, check=False).data.calibration, key)
    assert found == expected.replace("HERE", str(folder)).replace("HOME", "/home/user")


def test_a_metric_of_ones_own_may_be_a_file(folder: Path) -> None:
    text = MINIMAL + "precision: {target: {metric: 'metrics.py:f1', min: 3}}\n"
    assert error(text) == (
        f"c.yaml:9: precision.target.metric: no such file: {folder / 'metrics.py'}"
    )
    write("metrics.py", "")
    target = load(text).precision.target
    assert target is not None
    assert target.metric == f"{folder / 'metrics.py'}:f1"


def test_variables_come_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_NETS", str(folder))
    monkeypatch.delenv("TRT_TAKE", raising=False)
    text = MINIMAL.replace("model.onnx", "${TRT_NETS}/model.onnx") + "    take: ${TRT_TAKE:-12}\n"
    config = load(text)
    assert config.model.path == str(folder / "model.onnx")
    assert config.data.calibration.take == 12


def test_a_variable_that_is_not_set_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRT_NETS", raising=False)
    text = MINIMAL.replace("model.onnx", "${TRT_NETS}/model.onnx")
    assert error(text) == (
        "c.yaml:4: model.path: environment variable TRT_NETS is not set; set it, or write a "
        "default: "
        "${TRT_NETS:-...}"
    )
    assert load(text, "model.path=model.onnx").model.path == str(folder / "model.onnx")
    assert error(MINIMAL + "extends: ${TRT_NETS}/a.yaml").startswith(
        "c.yaml:9: extends: environment variable TRT_NETS is not set"
    )


def test_later_files_and_keys_win(folder: Path) -> None:
    write("a.yaml", "calibration: {method: max, holdout: 3}\nbackends: [{name: tensorrt}]\n")
    write("b.yaml", "extends: a.yaml\ncalibration: {method: mse, percentile: 99}\n")
    write("d.yaml", "calibration: {percentile: 98}\n")
    config = load(MINIMAL + "extends: [b.yaml, d.yaml]\ncalibration: {memory: 1MiB}\n")
    calibration = config.calibration
    assert (calibration.method, calibration.holdout) == ("mse", 3)
    assert (calibration.percentile, calibration.memory) == (98, 1 << 20)
    assert [backend.label for backend in config.backends] == ["tensorrt"]


def test_a_problem_in_a_parent_names_the_parent(folder: Path) -> None:
    write("base/a.yaml", "\ncalibration: {metod: max}\n")
    assert error(MINIMAL + "extends: base/a.yaml") == (
        "base/a.yaml:2: calibration.metod: unknown key; did you mean 'method'?"
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(
            "presets/imagnet.yaml",
            "no file 'presets/imagnet.yaml' in HERE; did you mean 'presets/imagenet.yaml'?",
            id="misspelled preset",
        ),
        pytest.param(
            "[qq]",
            "no file 'qq' in HERE; built in are presets/cifar10.yaml, presets/fp16.yaml, "
            "presets/imagenet.yaml, presets/int8.yaml",
            id="no such file",
        ),
        pytest.param(
            "../schema.py",
            "no file '../schema.py' in HERE; built in are presets/cifar10.yaml, presets/fp16.yaml, "
            "presets/imagenet.yaml, presets/int8.yaml",
            id="not out of the presets",
        ),
        pytest.param("3", "expected a file name or a list of them, found 3", id="a number"),
        pytest.param("", "expected a file name or a list of them, found nothing", id="nothing"),
        pytest.param("c.yaml", "goes round in a circle: HERE/c.yaml -> HERE/c.yaml", id="itself"),
    ],
)
def test_extends_that_cannot_be_followed(folder: Path, value: str, expected: str) -> None:
    assert error(MINIMAL + f"extends: {value}\n") == (
        f"c.yaml:9: extends: {expected.replace('HERE', str(folder))}"
    )


def test_a_longer_circle_is_shown_whole(folder: Path) -> None:
    write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "extends: a.yaml\n")
    assert error(MINIMAL + "extends: a.yaml") == "b.yaml:1: extends: goes round in a circle: " + (
        " -> ".join(str(folder / name) for name in ("c.yaml", "a.yaml", "b.yaml", "a.yaml"))
    )


def test_one_parent_by_two_ways_is_no_circle(folder: Path) -> None:
    write("base.yaml", "compare: {pictures: 3}\n")
    write("a.yaml", "extends: base.yaml\n")
    write("b.yaml", "extends: base.yaml\n")
    assert load(MINIMAL + "extends: [a.yaml, b.yaml]").compare.pictures == 3


def test_a_file_of_ones_own_wins_over_a_preset(folder: Path) -> None:
    write("presets/int8.yaml", "compare: {pictures: 3}\n")
    assert load(MINIMAL + "extends: presets/int8.yaml").compare.pictures == 3


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        pytest.param("calibration.method=mse", "calibration.method", "mse", id="a word"),
        pytest.param("name=a=b", None, "--set: name: 'a=b' does not fit: name", id="= in a value"),
        pytest.param(
            "data.calibration.sample=3", "data.calibration.sample", 3, id="takes the place of take"
        ),
        pytest.param(
            "data.calibration.sample=3", "data.calibration.take", None, id="and take is gone"
        ),
        pytest.param("backends.0.threads=2", "backends.0.threads", 2, id="an entry of a list"),
        pytest.param(
            "backends.0.threads=2", "backends.0.lowering", "deploy", id="and the rest stays"
        ),
        pytest.param(
            "backends=[{name: tensorrt}]", "backends.0.name", "tensorrt", id="a whole list"
        ),
        pytest.param(
            'precision.pin."a.b"=fp32', "precision.pin", {"a.b": "fp32", "c": "fp16"}, id="quoted"
        ),
        pytest.param(
            "precision.pin.re:^x=fp16", "precision.pin", {"re:^x": "fp16", "c": "fp16"}, id="re:"
        ),
        pytest.param(
            "precision.pin={}", "precision.pin", {"c": "fp16"}, id="an empty mapping adds nothing"
        ),
        pytest.param("precision.target=null", "precision.target", None, id="null"),
        pytest.param(
            "precision.target.min=0.8", "precision.target.max_drop", None, id="the other bound"
        ),
        pytest.param("calibration.memory=1GiB", "calibration.memory", 1 << 30, id="a size"),
        pytest.param(
            "calibration.metod=1",
            None,
            "--set: calibration.metod: unknown key; did you mean 'method'?",
            id="no such key",
        ),
        pytest.param(
            "bla.blub=1", None, "--set: bla: unknown key; there are only", id="no such section"
        ),
        pytest.param(
            "backends.1.threads=2",
            None,
            "--set: backends.1: '1' is not an entry of the list: 0 to 0",
            id="no such entry",
        ),
        pytest.param(
            "backends.x.threads=2",
            None,
            "--set: backends.x: 'x' is not an entry of the list: 0 to 0",
            id="a word as index",
        ),
        pytest.param(
            "calibration.method",
            None,
            "--set calibration.method: expected key.path=value, such as",
            id="no value",
        ),
        pytest.param("=3", None, "--set =3: expected key.path=value, such as", id="no key"),
        pytest.param(
            "a..b=3", None, "--set a..b=3: expected key.path=value, such as", id="two dots"
        ),
        pytest.param("name=[", None, "--set: not YAML: ", id="a value that is not YAML"),
        pytest.param(
            "name=${TRT_X}",
            None,
            "--set: name: environment variable TRT_X is not set",
            id="a variable",
        ),
    ],
)
def test_overrides(
    folder: Path, monkeypatch: pytest.MonkeyPatch, override: str, key: str | None, expected: Any
) -> None:
    monkeypatch.delenv("TRT_X", raising=False)
    text = MINIMAL + textwrap.dedent("""\
        backends: [{name: onnxruntime, lowering: deploy}]
        precision: {pin: {c: fp16}, target: {metric: top1, max_drop: 0.01}}
    """).replace("backends", "    take: 5\nbackends", 1)
    if key is None:
        assert error(text, override).startswith(expected)
        return
    found: Any = load(text, override)
    for part in key.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    assert found == expected


def test_an_entry_of_the_default_backends_can_be_set(folder: Path) -> None:
    (backend,) = load(MINIMAL, "backends.0.lowering=deploy").backends
    assert backend.label == "onnxruntime/deploy"


def test_later_overrides_win(folder: Path) -> None:
    assert load(MINIMAL, "name=a", "name=b").name == "b"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param(
            ["model.path=modle.onnx"],
            "--set: model.path: no such file: HERE/modle.onnx; did you mean 'HERE/model.onnx'?",
            id="misspelled model",
        ),
        pytest.param(
            ["model.path=xyzzy"],
            "--set: model.path: no such file: HERE/xyzzy; HERE holds model.onnx",
            id="a model like no other",
        ),
        pytest.param(
            ["model.path=pictures"],
            "--set: model.path: is a folder: HERE/pictures; expected an ONNX file",
            id="a folder for a model",
        ),
        pytest.param(
            ["model.path=nets/a/m.onnx"],
            "--set: model.path: no such file: HERE/nets/a/m.onnx; there is no 'nets' in HERE",
            id="a folder that is missing",
        ),
        pytest.param(
            ["data.calibration.path=picture"],
            "--set: data.calibration.path: no such folder: HERE/picture; did you mean "
            "'HERE/pictures'?",
            id="misspelled pictures, said once although evaluation inherits them",
        ),
        pytest.param(
            ["data.calibration.path=model.onnx"],
            "--set: data.calibration.path: not a folder: HERE/model.onnx; source images reads the "
            "pictures in a folder",
            id="a file for pictures",
        ),
        pytest.param(
            ["data.evaluation.path=xyz"],
            "--set: data.evaluation.path: no such folder: HERE/xyz",
            id="only the evaluation",
        ),
        pytest.param(
            ["data.calibration.labels=l.csv"],
            "--set: data.calibration.labels: no such file: HERE/l.csv",
            id="labels of pictures",
        ),
        pytest.param(
            ["data.calibration.source=arrays", "data.calibration.path=a.npz"],
            "--set: data.calibration.path: no such file: HERE/a.npz",
            id="arrays",
        ),
        pytest.param(
            ["data.calibration.source=python", "data.calibration.path=l.py:f"],
            "--set: data.calibration.path: no such file: HERE/l.py",
            id="a Python file",
        ),
        pytest.param(
            ["calibration.cache=a.cache"],
            "--set: calibration.cache: no such file: HERE/a.cache",
            id="a calibration cache",
        ),
        pytest.param(
            ["calibration.cache=a.cache", "model.path=m/m.onnx"],
            "--set: model.path: no such file: HERE/m/m.onnx; there is no 'm' in HERE\n"
            "--set: calibration.cache: no such file: HERE/a.cache",
            id="two files",
        ),
    ],
)
def test_files_that_are_missing(folder: Path, overrides: list[str], expected: str) -> None:
    found = error(MINIMAL, *overrides)
    assert found == expected.replace("HERE", str(folder))
    config = load(MINIMAL, *overrides, check=False)
    with pytest.raises(ConfigError) as caught:
        check_files(config)
    assert str(caught.value) == found.replace("--set: ", "")


def test_a_module_that_is_installed_needs_no_file(folder: Path) -> None:
    config = load(MINIMAL, "data.calibration.source=python", "data.calibration.path=json:loads")
    check_files(config)
    assert config.data.calibration.path == "json:loads"


FULL = """\
version: 1
name: everything
model:
  path: model.onnx
  shapes: {"in: put": {min: [1, 3], opt: [8, 3], max: [32, 3]}}
data:
  calibration:
    source: images
    path: pictures
    labels: null
    take: 256
    preprocess: {resize: [40, 30], crop: [32, 20], mean: [0.485, 0.456, 0.406], channels: BGR}
  evaluation: {skip: 256}
calibration: {method: percentile, percentile: 99.999, memory: 512MiB}
precision:
  default: int8
  fallback: fp16
  pin: {"op:Softmax": fp32, "re:^${x}yes$": bf16, "on": fp16, "1e3": fp32}
  target: {metric: sqnr_db, min: 2e1}
compare: {pictures: 8, memory: 1000, alone: false}
backends:
  - {name: onnxruntime, lowering: deploy, threads: 2}
  - {name: tensorrt_rtx, compute_capabilities: [8.9, "12.0"]}
  - {name: tensorrt, workspace: 4GiB, timing_cache: timing.cache, typing: weak, calibrator: minmax}
report: {formats: [], latency: null}
"""


@pytest.mark.parametrize("text", [MINIMAL, FULL], ids=["minimal", "full"])
def test_a_written_config_reads_back_equal(folder: Path, text: str) -> None:
    config = load(text)
    dumped = dump_config(config)
    assert load_config(write("elsewhere/again.yaml", dumped)) == config
    assert dump_config(load_config("elsewhere/again.yaml")) == dumped


def test_a_full_config_has_what_was_written(folder: Path) -> None:
    config = load(FULL)
    assert dict(config.precision.pin) == {
        "op:Softmax": "fp32",
        "re:^${x}yes$": "bf16",
        "on": "fp16",
        "1e3": "fp32",
    }
    assert config.model.shapes["in: put"].max == (32, 3)
    assert config.data.evaluation.take is None
    assert config.data.evaluation.labels is None
    assert config.data.evaluation.preprocess == config.data.calibration.preprocess


def validate(value: object) -> None:
    jsonschema.Draft202012Validator(json_schema()).validate(value)


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("name", presets())
def test_presets_fit_the_schema_and_complete_a_config(folder: Path, name: str) -> None:
    validate(yaml.safe_load((PRESETS / name).read_text(encoding="utf-8")))
    config = load(f"extends: presets/{name}\n" + MINIMAL)
    assert load_config(write("again.yaml", dump_config(config))) == config


def test_presets_are_few_and_commented() -> None:
    assert presets() == ["cifar10.yaml", "fp16.yaml", "imagenet.yaml", "int8.yaml"]
    for name in presets():
        assert (PRESETS / name).read_text(encoding="utf-8").startswith("# "), name


def test_the_imagenet_preset_is_torchvisions(folder: Path) -> None:
    preprocess = load("extends: presets/imagenet.yaml\n" + MINIMAL).data.evaluation.preprocess
    assert preprocess is not None
    assert (preprocess.resize, preprocess.crop) == (256, 224)
    assert preprocess.scale == 1 / 255
    assert preprocess.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("text", [MINIMAL, FULL], ids=["minimal", "full"])
def test_configs_fit_the_schema_as_written_and_as_dumped(folder: Path, text: str) -> None:
    validate(yaml.safe_load(text.replace("2e1", "20")))
    validate(yaml.safe_load(dump_config(load(text)).replace("2e1", "20")))


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({"extends": "presets/int8.yaml"}, id="nothing but extends"),
        pytest.param({"extends": ["a.yaml", "b.yaml"]}, id="several"),
        pytest.param({"compare": {"pictures": "${N:-3}"}}, id="a variable for a number"),
        pytest.param({"calibration": {"method": "${METHOD}"}}, id="a variable for a choice"),
        pytest.param({"calibration": {"memory": "1.5 GiB"}}, id="a size"),
        pytest.param(
            {"precision": {"target": {"metric": "m:f", "min": 3}}}, id="a metric of one's own"
        ),
        pytest.param({"data": {"evaluation": {"skip": 3}}}, id="a part of a section"),
    ],
)
def test_the_schema_takes(value: object) -> None:
    validate(value)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({"calibration": {"metod": "max"}}, id="an unknown key"),
        pytest.param({"calibration": {"method": "maxx"}}, id="an unknown choice"),
        pytest.param({"compare": {"pictures": "3"}}, id="text for a number"),
        pytest.param({"backends": [{"lowering": "deploy"}]}, id="a backend without a name"),
        pytest.param({"backends": []}, id="no backend"),
        pytest.param({"precision": {"pin": {"a": "fp4"}}}, id="an unknown precision"),
        pytest.param(
            {"precision": {"target": {"metric": "top2", "min": 3}}}, id="an unknown metric"
        ),
        pytest.param({"calibration": {"memory": "much"}}, id="not a size"),
    ],
)
def test_the_schema_refuses(value: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate(value)


def test_the_pin_that_was_given_last_stands_last(folder: Path) -> None:
    pins = "precision: {pin: {conv1: int8, 'op:Conv': fp16, fc: fp32}}\n"
    config = load(MINIMAL + pins, "precision.pin.conv1=fp32", "precision.pin.fc=int8")
    assert list(config.precision.pin.items()) == [
        ("op:Conv", "fp16"), ("conv1", "fp32"), ("fc", "int8"),
    ]  # fmt: skip
    again = load_config(write("again.yaml", dump_config(config)), check=False)
    assert list(again.precision.pin) == list(config.precision.pin)


def test_a_pin_of_the_file_stands_behind_those_that_it_extends(folder: Path) -> None:
    write("base.yaml", "precision: {pin: {conv1: int8, 'op:Conv': fp16}}")
    config = load("extends: base.yaml\n" + MINIMAL + "precision: {pin: {conv1: fp32}}\n")
    assert list(config.precision.pin.items()) == [("op:Conv", "fp16"), ("conv1", "fp32")]
