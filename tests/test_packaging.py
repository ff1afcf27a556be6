"""The wheel holds exactly the packages that are on disk, and nothing under a bare folder name."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDERS = ("calibrate", "configs", "datasets", "precision", "reports")


def listed_packages() -> set[str]:
    """`packages` in pyproject.toml; read by pattern, since tomllib is not in Python 3.10."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    match = re.search(r"^packages = (\[[^\]]*\])", text, re.MULTILINE)
    assert match is not None
    return set(ast.literal_eval(match[1]))


def test_listed_packages_are_the_folders_on_disk() -> None:
    found = {"trtune"}
    own = [path for path in (ROOT / "trtune").iterdir() if path.is_dir() and not path.is_symlink()]
    for init in (init for path in own for init in path.rglob("__init__.py")):
        found.add(".".join(("trtune", *init.parent.relative_to(ROOT / "trtune").parts)))
    for folder in FOLDERS:
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join(("trtune", *init.parent.relative_to(ROOT).parts)))
    assert listed_packages() == found


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_with_modules_is_a_package(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} lacks an __init__.py"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imported_by_its_bare_name_is_loud(folder: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"use trtune.{folder}" in done.stderr


def test_the_version_stands_in_one_place() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert 'dynamic = ["version"]' in project
    assert not re.search(r"^version = \"", project, re.M)
    found = re.findall(r'^__version__ = "(.*)"$', (ROOT / "trtune/__init__.py").read_text(), re.M)
    assert len(found) == 1
    assert f"\n## {found[0]}" in (ROOT / "docs/changelog.md").read_text("utf-8")


def test_the_release_workflow_tries_what_it_publishes() -> None:
    text = (ROOT / ".github/workflows/release.yml").read_text("utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs["publish"]["needs"] == "try"
    assert jobs["try"]["needs"] == "build"
    assert {"make lint", "make test", "make docs"} <= {s.get("run") for s in jobs["build"]["steps"]}


def required() -> set[str]:
    """The distributions that `make demo`, `make test`, `make lint` and `make docs` ask for."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    lists = re.findall(
        r"^(?:dependencies|detection|docs|examples|rtx|dev) = \[(.*?)\]$", text, re.M | re.S
    )
    names = {name for part in lists for name in re.findall(r'"([A-Za-z0-9_.-]+)', part)}
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names} - {"trtune"}


def test_the_tested_versions_name_all_that_is_required_and_no_index() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    pattern = r"([a-z0-9-]+)==[0-9][0-9a-z.+]*( ; .+)?"
    assert [line for line in pinned if not re.fullmatch(pattern, line)] == []
    assert required() - {line.partition("==")[0] for line in pinned} == set()
    assert "torch" not in {line.partition("==")[0] for line in pinned}


def copy_sources(target: Path) -> None:
    """What a clean checkout holds, uncommitted changes included; links stay links."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True,
    ).stdout.decode()  # fmt: skip
    for name in filter(None, listed.split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_symlink() or source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy, follow_symlinks=False)


def call(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment that has the wheel and none of its dependencies."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git to tell the project's files from others")
    folder = tmp_path_factory.mktemp("packaging")
    copy_sources(folder / "source")
    wheels = folder / "wheels"
    call(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "-w",
        wheels,
        folder / "source",
        cwd=folder,
    )
    (wheel,) = wheels.glob("trtune-*.whl")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    target = call(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    ).strip()
    call(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=folder)
    return python


@pytest.mark.slow
def test_the_wheel_has_every_module_and_data_file(installed: Path) -> None:
    site = next((installed.parents[1] / "lib").glob("python*/site-packages"))
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".yaml", ".jinja")
    }
    package = site / "trtune"
    found = {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file()}
    assert wanted <= found
    assert {"__init__.py", "__main__.py", "py.typed"} <= found
    assert not any(path.is_symlink() for path in package.rglob("*"))
    assert sorted(p.name for p in site.iterdir() if p.name in (*FOLDERS, "tests")) == []


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_bare_folder_names_find_nothing_of_ours(installed: Path, folder: str) -> None:
    program = f"""
import importlib.util
assert importlib.util.find_spec("trtune") is not None
assert importlib.util.find_spec("trtune.{folder}.__init__".rpartition(".")[0]) is not None
print(importlib.util.find_spec("{folder}"))
"""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = call(installed, "-I", "-c", program, cwd=installed.parents[2], env=env)
    assert found.strip() == "None"
