"""YAML with lines: scalars, variables, merging, writing back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtune.configs.errors import ConfigError
from trtune.configs.yamltree import (
    Origin,
    Problem,
    Tree,
    Unset,
    dotted,
    expand,
    inline_yaml,
    merge,
    parse_yaml,
    raise_problems,
    to_yaml,
)

FILE = Origin("a.yaml", None, Path("/configs"))


def parse(text: str, environ: Mapping[str, str] | None = None) -> Tree:
    return parse_yaml(text, FILE, environ=environ or {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("5e-3", 0.005, id="a number without a point"),
        pytest.param("1.", 1.0, id="a point and nothing behind it"),
        pytest.param("-.5", -0.5, id="a point and nothing before it"),
        pytest.param("007", 7, id="leading zeros are not octal"),
        pytest.param("0o17", 15, id="octal"),
        pytest.param("0xff", 255, id="hexadecimal"),
        pytest.param("-.inf", float("-inf"), id="minus infinity"),
        pytest.param("yes", "yes", id="yes is text"),
        pytest.param("off", "off", id="off is text"),
        pytest.param("True", True, id="true in any of three spellings"),
        pytest.param("~", None, id="null"),
        pytest.param("1:30", "1:30", id="no base 60"),
        pytest.param("2024-01-01", "2024-01-01", id="no dates"),
        pytest.param("'3'", "3", id="quoted digits are text"),
        pytest.param("!!str 3", "3", id="an explicit tag"),
        pytest.param("[1, a, null]", [1, "a", None], id="a list"),
    ],
)
def test_scalars(text: str, expected: object) -> None:
    value = parse(f"a: {text}").value["a"]
    assert value == expected
    assert type(value) is type(expected)


def test_nan_is_read() -> None:
    value = parse("a: .NaN").value["a"]
    assert value != value


def test_keys_are_always_text() -> None:
    assert parse("{123: a, true: b, no: c}").value == {"123": "a", "true": "b", "no": "c"}


def test_every_value_knows_its_line() -> None:
    tree = parse("a: 1\nb:\n  c: [x,\n    y]\n")
    lines = {key: origin.line for key, origin in tree.origins.items()}
    assert lines == {(): 1, ("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "c", 0): 3, ("b", "c", 1): 4}
    assert str(tree.origin(("b", "c", 1, "beyond"))) == "a.yaml:4"
    assert str(tree.origin(("z",))) == "a.yaml:1"


def test_anchors_and_merge_keys() -> None:
    text = "base: &b {x: 1, y: 2}\nmore: &m {z: 3}\nuse:\n  <<: [*b, *m]\n  y: 5\ncopy: *b\n"
    tree = parse(text)
    assert tree.value["use"] == {"y": 5, "x": 1, "z": 3}
    assert tree.value["copy"] == {"x": 1, "y": 2}
    assert tree.origins["use", "y"].line == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "a: 1\nb: 2\na: 3\n",
            "a.yaml:3: a: this key is given twice (first on line 1)",
            id="a key given twice",
        ),
        pytest.param(
            "a:\n  b: 1\n  b: 2\nc: 1\nc: 2",
            "a.yaml:3: a.b: this key is given twice (first on line 2)\n"
            "a.yaml:5: c: this key is given twice (first on line 4)",
            id="two keys given twice are both reported",
        ),
        pytest.param("a: &x [*x]", "a.yaml:1: a.0: an alias that holds itself", id="endless alias"),
        pytest.param(
            "? [a, b]\n: 1",
            "a.yaml:1: a key must be a word, not a list or a mapping",
            id="list as key",
        ),
        pytest.param(
            "a: !!python/name:os.system x",
            "a.yaml:1: a: 'x' cannot be read as tag:yaml.org,2002:python/name:os.system",
            id="no Python objects",
        ),
        pytest.param(
            "a: !!int x", "a.yaml:1: a: 'x' cannot be read as tag:yaml.org,2002:int", id="wrong tag"
        ),
        pytest.param(
            "a: ${B",
            "a.yaml:1: a: ${ without its } in '${B'; write $${ for a plain ${",
            id="variable that is not closed",
        ),
        pytest.param(
            "a: ${1B}",
            "a.yaml:1: a: '${1B}' is not ${NAME} or ${NAME:-default}; write $${ for a plain ${",
            id="not a name",
        ),
        pytest.param(
            "a:\n\tb: 1",
            "a.yaml:2: not YAML: found character '\\t' that cannot start any token; "
            "indent with spaces, not tabs\n    b: 1",
            id="tabs",
        ),
        pytest.param(
            "a: {b: ${C}/d}",
            "a.yaml:1: not YAML: expected ',' or '}', but got '{'; put a value with ${...} in "
            "quotes "
            "when it stands inside { } or [ ]\n    a: {b: ${C}/d}",
            id="variable inside braces",
        ),
        pytest.param(
            "a: [1",
            "a.yaml:1: not YAML: expected ',' or ']', but got '<stream end>'\n    a: [1",
            id="open bracket",
        ),
        pytest.param(
            "a: \x01", "a.yaml: not YAML: unacceptable character #x0001", id="control byte"
        ),
    ],
)
def test_what_is_not_a_config_is_refused_with_its_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("text", "environ", "expected"),
    [
        pytest.param("${A}/b", {"A": "x"}, "x/b", id="a variable"),
        pytest.param("${A}${A}", {"A": "x"}, "xx", id="twice"),
        pytest.param("${A:-d}", {}, "d", id="default when unset"),
        pytest.param("${A:-d}", {"A": ""}, "d", id="default when empty, as in a shell"),
        pytest.param("${A}", {"A": ""}, "", id="empty without a default is empty"),
        pytest.param("${A:-}", {}, "", id="an empty default"),
        pytest.param("${A:-${B:-c}/d}", {}, "c/d", id="a default in a default"),
        pytest.param("${A:-${B}}", {"B": "b"}, "b", id="a variable in a default"),
        pytest.param("${A:-${B}}", {"A": "a"}, "a", id="a default that is not needed may be unset"),
        pytest.param("${A:-http://x:-y}", {}, "http://x:-y", id="only the first :- counts"),
        pytest.param("$${A}", {"A": "x"}, "${A}", id="escaped"),
        pytest.param("$A {B} $", {}, "$A {B} $", id="anything else is plain"),
    ],
)
def test_expand(text: str, environ: dict[str, str], expected: str) -> None:
    assert expand(text, environ) == expected


def test_a_variable_that_is_not_set_stays_open() -> None:
    assert expand("${A}/${B:-x}", {}) == Unset("A")
    assert expand("${A:-${B}}", {}) == Unset("B")
    assert parse("a: ${A}").value == {"a": Unset("A")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("${N}", 256, id="plain: read again as YAML"),
        pytest.param("'${N}'", "256", id="quoted: text"),
        pytest.param("${N}px", "256px", id="part of a word"),
        pytest.param("${E}", None, id="empty is null"),
    ],
)
def test_a_plain_variable_may_be_a_number(text: str, expected: object) -> None:
    assert parse(f"a: {text}", {"N": "256", "E": ""}).value["a"] == expected


TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cn", "Co")), max_size=12
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | TEXTS
    | st.sampled_from(
        ["${A}", "$${", "yes", "1e3", "0o7", "<<", "~", "a: b", "# c", "\n", "2024-01-01"]
    )
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
)


@given(VALUES)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert parse(to_yaml({"a": value})).value == {"a": value}
    assert parse(f"a: {inline_yaml(value)}").value == {"a": value}


def test_lists_of_words_are_written_on_one_line() -> None:
    value = {"mean": [0.5, 1], "all": [{"name": "a"}]}
    assert to_yaml(value) == "mean: [0.5, 1]\nall:\n- name: a\n"


@pytest.mark.parametrize(
    ("base", "over", "expected"),
    [
        pytest.param("{a: {x: 1}}", "{a: {y: 2}}", {"a": {"x": 1, "y": 2}}, id="mappings join"),
        pytest.param("{a: [1, 2]}", "{a: [3]}", {"a": [3]}, id="lists are replaced"),
        pytest.param("{a: {x: 1}}", "{a: null}", {"a": None}, id="null replaces a mapping"),
        pytest.param(
            "{precision: {target: {metric: top1, max_drop: 0.1}}}",
            "{precision: {target: {min: 0.8}}}",
            {"precision": {"target": {"metric": "top1", "min": 0.8}}},
            id="min takes the place of max_drop",
        ),
        pytest.param(
            "{precision: {target: {metric: top1, max_drop: 0.1}}}",
            "{precision: {target: {metric: sqnr_db, min: 20}}}",
            {"precision": {"target": {"metric": "sqnr_db", "min": 20}}},
            id="another metric starts afresh",
        ),
        pytest.param(
            "{data: {calibration: {take: 8, batch: 2}}}",
            "{data: {calibration: {sample: 9}}}",
            {"data": {"calibration": {"sample": 9, "batch": 2}}},
            id="sample takes the place of take",
        ),
        pytest.param(
            "{data: {calibration: {source: images, path: a, labels: b, batch: 2}}}",
            "{data: {calibration: {source: arrays, path: c}}}",
            {"data": {"calibration": {"source": "arrays", "path": "c", "batch": 2}}},
            id="another source drops the labels of the first",
        ),
    ],
)
def test_merge(base: str, over: str, expected: object) -> None:
    assert merge(parse(base), parse(over)).value == expected


def test_merge_keeps_who_wrote_what() -> None:
    base = parse_yaml("a: 1\nb: [1, 2]", Origin("base.yaml", None, Path("/b")), environ={})
    merged = merge(base, parse("b: [3]\nc: 4"))
    assert str(merged.origin(("a",))) == "base.yaml:1"
    assert str(merged.origin(("b", 0))) == "a.yaml:1"
    assert ("b", 1) not in merged.origins


@given(VALUES, VALUES)
def test_merge_with_itself_or_nothing_changes_nothing(a: Any, b: Any) -> None:
    tree = Tree({"a": a, "b": b}, {(): FILE})
    assert merge(tree, tree).value == tree.value
    assert merge(tree, Tree({}, {})).value == tree.value


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        pytest.param(("a", 0, "b"), "a.0.b", id="an entry of a list"),
        pytest.param(("pin", "re:.*/se/.*"), 'pin."re:.*/se/.*"', id="dots are quoted"),
        pytest.param(("pin", "op:Softmax"), "pin.op:Softmax", id="colons are not"),
    ],
)
def test_dotted(key: tuple[str | int, ...], expected: str) -> None:
    assert dotted(key) == expected


def test_problems_are_raised_together_and_once() -> None:
    raise_problems([])
    problem = Problem(("a",), "is wrong", Origin("f", 3, Path()))
    with pytest.raises(ConfigError) as caught:
        raise_problems([problem, Problem((), "all is wrong"), problem])
    assert str(caught.value) == "f:3: a: is wrong\nall is wrong"
