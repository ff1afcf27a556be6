"""Where TensorRT is, and what to do where it is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trtune.precision.backends.trt.version import (
    INSTALL_TENSORRT,
    SYSTEM_FOLDERS,
    remedy_for_absent,
)


def test_without_a_system_package_it_is_installed_from_the_index(tmp_path: Path) -> None:
    assert remedy_for_absent(tmp_path) == INSTALL_TENSORRT


@pytest.mark.parametrize("folder", SYSTEM_FOLDERS)
def test_the_systems_own_is_named_where_the_environment_does_not_see_it(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / folder / "tensorrt"
    place.mkdir(parents=True)
    (place / "__init__.py").touch()
    remedy = remedy_for_absent(tmp_path)
    assert str(place) in remedy
    assert "--system-site-packages" in remedy
    monkeypatch.setattr(sys, "path", [*sys.path, str(place.parent)])
    assert remedy_for_absent(tmp_path) == INSTALL_TENSORRT
