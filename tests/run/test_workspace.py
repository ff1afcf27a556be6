"""The workspace: what it keeps, reuses, and explains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtune.run.stage import Form, Kept, Need, Stage
from trtune.run.workspace import Workspace


class Maker:
    """Counts how often it made its value."""

    def __init__(self, value: Any = 1) -> None:
        self.value = value
        self.times = 0

    def __call__(self, folder: Path) -> Any:
        self.times += 1
        return self.value


def stage(make: Callable[[Path], Any], /, name: str = "gate", **needs: Any) -> Stage[Any]:
    return Stage(name, needs or {"model": "abc", "method": None}, make)


class TestKeeping:
    @pytest.mark.parametrize(
        "value", [{"a": [1, 2.5, None]}, [], 0, True, {"sqnr_db": float("inf")}]
    )
    def test_a_value_is_made_once(self, tmp_path: Path, value: object) -> None:
        make = Maker(value)
        for _ in range(2):
            ws = Workspace(tmp_path)
            assert ws.get(stage(make)) == value
            assert ws.get(stage(make)) == value
        assert make.times == 1
        assert [p.name for p in (tmp_path / "stages").iterdir()] == ["gate.json"]

    def test_holds_says_so_without_making_it(self, tmp_path: Path) -> None:
        make, ws = Maker(), Workspace(tmp_path)
        assert not ws.holds(stage(make))
        ws.get(stage(make))
        assert ws.holds(stage(make))
        assert Workspace(tmp_path).holds(stage(make))
        assert make.times == 1

    def test_of_one_with_many_values_each_is_kept(self, tmp_path: Path) -> None:
        make = Maker()
        stages = [Stage("evaluation", {"plan": n}, make, many=True) for n in (1, 2, 1, 2)]
        for one in stages:
            Workspace(tmp_path).get(one)
        assert make.times == 2

    def test_of_any_other_the_last(self, tmp_path: Path) -> None:
        make = Maker()
        for n in (1, 2, 1):
            Workspace(tmp_path).get(stage(make, plan=n))
        assert make.times == 3

    def test_what_fails_is_not_kept(self, tmp_path: Path) -> None:
        def fail(folder: Path) -> Any:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Workspace(tmp_path).get(stage(fail))
        assert not Workspace(tmp_path).holds(stage(fail))

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param('{"needs": {"mo', id="cut off"),
            pytest.param('{"value": 1}', id="no key"),
            pytest.param("[1]", id="a list"),
            pytest.param("", id="empty"),
            pytest.param('{"needs": 3, "told": {}, "files": {}, "value": 1}', id="no mapping"),
            pytest.param('{"needs": {}, "told": [1], "files": {}, "value": 1}', id="told no one"),
        ],
    )
    def test_a_broken_record_is_as_good_as_none(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
    ) -> None:
        (tmp_path / "stages").mkdir()
        (tmp_path / "stages" / "gate.json").write_text(text)
        make = Maker()
        assert Workspace(tmp_path).get(stage(make)) == 1
        assert make.times == 1
        assert "gate.json cannot be read (" in caplog.text


class TestExplaining:
    @pytest.mark.parametrize(
        ("needs", "changed"),
        [
            pytest.param({"model": "xyz", "data": "d"}, "model", id="one need"),
            pytest.param({"model": "x", "data": "y"}, "model, data", id="two"),
            pytest.param({"model": "abc", "data": "d", "onnx": "1.19"}, "onnx", id="a new one"),
            pytest.param({"model": "abc"}, "data", id="one that is gone"),
        ],
    )
    def test_the_needs_that_changed_are_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, needs: dict[str, Any], changed: str
    ) -> None:
        make = Maker()
        Workspace(tmp_path).get(stage(make, model="abc", data="d"))
        with caplog.at_level(logging.INFO):
            Workspace(tmp_path).get(stage(make, **needs))
        assert caplog.messages == [f"gate again: {changed} changed"]
        assert make.times == 2

    def test_the_config_is_named_where_it_decided(self, tmp_path: Path) -> None:
        def of(content: str, **told: Any) -> Stage[Any]:
            need = Need(content, {f"data.{name}": value for name, value in told.items()})
            return Stage("calibrate", {"data": need}, Maker())

        ws = Workspace(tmp_path)
        ws.get(of("old", mean=[0, 0], path="p"))
        assert ws.why(of("new", mean=[1, 0], path="p")) == "data.mean changed"
        assert ws.why(of("new", mean=[0, 0], path="p")) == "data changed"  # the files did
        assert ws.why(of("old", mean=[1, 0], path="q")) == ""  # told alone decides nothing

    def test_a_version_of_the_stage(self, tmp_path: Path) -> None:
        ws = Workspace(tmp_path)
        ws.get(Stage("gate", {}, Maker()))
        assert ws.why(Stage("gate", {}, Maker(), version=2)) == "version changed"
        assert ws.why(Stage("other", {}, Maker())) == "never made"

    def test_what_is_reused_is_logged(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        Workspace(tmp_path).get(stage(Maker()))
        with caplog.at_level(logging.INFO):
            Workspace(tmp_path).get(stage(Maker()))
        assert caplog.messages == [f"gate: reused from {tmp_path}/stages/gate.json"]


def written(value: str, folder: Path) -> Kept:
    (folder / "a.txt").write_text(value)
    return None, ("a.txt",)


FILES: Form[str] = Form(written, lambda held, folder: (folder / "a.txt").read_text())


class TestFiles:
    def of(self, value: str, make: Callable[[Path], Any] | None = None) -> Stage[str]:
        return Stage("file", {"value": value}, make or Maker(value), FILES)

    def test_they_are_read_back(self, tmp_path: Path) -> None:
        Workspace(tmp_path).get(self.of("x"))
        assert Workspace(tmp_path).get(self.of("x")) == "x"

    @pytest.mark.parametrize(
        ("harm", "why"),
        [
            pytest.param(lambda path: path.unlink(), "is not there", id="gone"),
            pytest.param(lambda path: path.write_text("y"), "was changed, or cut off", id="edited"),
        ],
    )
    def test_one_that_is_not_what_was_written_is_made_again(
        self, tmp_path: Path, harm: Callable[[Path], None], why: str
    ) -> None:
        Workspace(tmp_path).get(self.of("x"))
        harm(tmp_path / "a.txt")
        make = Maker("x")
        assert why in Workspace(tmp_path).why(self.of("x", make))
        assert Workspace(tmp_path).get(self.of("x", make)) == "x"
        assert make.times == 1
        assert (tmp_path / "a.txt").read_text() == "x"

    def test_those_of_another_value_are_gone_while_it_is_made(self, tmp_path: Path) -> None:
        def look(folder: Path) -> str:
            assert not (folder / "a.txt").exists()
            return "y"

        Workspace(tmp_path).get(self.of("x"))
        assert Workspace(tmp_path).get(self.of("y", look)) == "y"

    def test_drop_takes_them_away(self, tmp_path: Path) -> None:
        Workspace(tmp_path).get(self.of("x"))
        Workspace(tmp_path).drop("file")
        Workspace(tmp_path).drop("never made")
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


class TestOtherRuns:
    def test_what_another_run_of_the_name_made_is_taken_over(self, tmp_path: Path) -> None:
        a, b = tmp_path / "a", tmp_path / "b"
        a.mkdir(), b.mkdir()
        make = Maker("x")
        one = Stage("file", {"v": 1}, make, FILES)
        Workspace(a).get(one)
        assert Workspace(b, [a]).get(one) == "x"
        assert make.times == 1
        assert (b / "a.txt").read_text() == "x"  # its own from now on
        assert Workspace(b).holds(one)

    def test_and_compared_with(self, tmp_path: Path) -> None:
        a, b = tmp_path / "a", tmp_path / "b"
        Workspace(a).get(stage(Maker(), method="max"))
        assert Workspace(b, [a]).why(stage(Maker(), method="mse")) == "method changed"

    def test_but_not_what_belongs_to_its_folder(self, tmp_path: Path) -> None:
        a, b = tmp_path / "a", tmp_path / "b"
        a.mkdir(), b.mkdir()
        make = Maker("x")
        one = Stage("file", {"v": 1}, make, Form(FILES.write, FILES.read, rooted=True))
        Workspace(a).get(one)
        Workspace(b, [a]).get(one)
        assert make.times == 2
