"""Every config that comes with the project: valid for editors, for `load_config`, and its model."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml
from realdata import DATA

from trtune.configs.errors import ConfigError
from trtune.configs.load import json_schema, load_config
from trtune.configs.progress import silent
from trtune.precision.graph.file import Model
from trtune.run.backends import backends_of, check_precisions

ROOT = Path(__file__).parents[1]
CONFIGS = sorted([*ROOT.glob("benchmarks/configs/*.yaml"), *ROOT.glob("examples/**/*.yaml")])


def unused() -> Model:
    """The model of backends that do not look at the data."""
    raise AssertionError("no backend here needs the model")


def test_they_are_found() -> None:
    names = {path.name for path in CONFIGS}
    assert {"digits.yaml", "mobilenetv2_imagenet.yaml", "efficientnet_b0_cifar10.yaml"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
class TestConfig:
    def test_the_schema_accepts_it(self, path: Path) -> None:
        jsonschema.Draft202012Validator(json_schema()).validate(yaml.safe_load(path.read_text()))

    def test_it_loads_wherever_the_data_is(
        self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TRTUNE_DATA", str(tmp_path))
        config = load_config(path, check=False)
        assert config.name.startswith(path.stem)
        assert Path(config.model.path).parent in (tmp_path / "models", path.parent)
        check_precisions(config)
        assert [
            backend.name for backend in backends_of(config, unused, silent, probe=False).present
        ]

    def test_what_it_names_is_there(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if DATA is not None:
            monkeypatch.setenv("TRTUNE_DATA", str(DATA))
        try:
            load_config(path)
        except ConfigError as error:
            data = path.is_relative_to(ROOT / "examples") or DATA is None
            if data and "no such file" in str(error):
                pytest.skip("its data is not here")
            raise
