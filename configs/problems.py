"""What pydantic found wrong with a config, said so that a user can mend it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trtune.configs.errors import did_you_mean
from trtune.configs.yamltree import Key, Problem, Tree, dotted

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_too_short": "text that is not empty",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping (`key: value`)",
    "mapping_type": "a mapping (`key: value`)",
    "model_type": "a mapping (`key: value`)",
    "model_attributes_type": "a mapping (`key: value`)",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def explain(error: ValidationError, root: type[BaseModel], tree: Tree) -> list[Problem]:
    """Every error as a problem: its key path, what was found, what is expected, where it stands.

    What `data.evaluation` and `data.validation` have from `data.calibration` is reported once,
    where it was written.
    """
    details = error.errors(include_url=False)
    problems = [_problem(detail, root, tree) for detail in details]
    said = {(p.key[2:], p.message) for p in problems if p.key[:2] == ("data", "calibration")}
    written = [
        problem
        for problem in problems
        if problem.key[:2] not in (("data", "evaluation"), ("data", "validation"))
        or problem.key in tree.origins
        or (problem.key[2:], problem.message) not in said
    ]
    return sorted(written, key=_place)


def _place(problem: Problem) -> tuple[str, int]:
    return (problem.origin.file, problem.origin.line or 0) if problem.origin else ("", 0)


def _problem(detail: ErrorDetails, root: type[BaseModel], tree: Tree) -> Problem:
    key = _without_tag(detail["loc"])
    if detail["type"] == "at_key":
        below = detail["ctx"]["key"]
        key += tuple(int(part) if part.isdigit() else part for part in below.split(".") if part)
        return Problem(key, detail["ctx"]["message"], tree.origin(key))
    if detail["type"].startswith("union_tag_"):
        key += ("name",)
    return Problem(key, _message(detail, key, root, tree), tree.origin(key))


def _without_tag(loc: Key) -> Key:
    """pydantic puts the name of the chosen backend into the path; the file has no such level."""
    return loc[:2] + loc[3:] if loc[:1] == ("backends",) and len(loc) > 2 else loc


def _message(detail: ErrorDetails, key: Key, root: type[BaseModel], tree: Tree) -> str:
    kind, context, found = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "extra_forbidden":
        return f"unknown key{_known_key(root, key, tree.value)}"
    if kind == "missing":
        about = _fields(root, key[:-1], tree.value).get(str(key[-1]))
        return "required, but not given" + (f": {about}" if about else "")
    if kind == "union_tag_not_found":
        return "required, but not given: which runtime"
    if kind == "literal_error":
        return _choice(found, re.findall(r"'([^']*)'", context["expected"]), context["expected"])
    if kind == "union_tag_invalid":
        tags = re.findall(r"'([^']*)'", context["expected_tags"])
        return _choice(found.get("name") if isinstance(found, Mapping) else found, tags)
    if kind == "choice":
        return _choice(found, context["options"], or_else=context["or_else"])
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"expected {words} {context[bound]:g}, found {shown(found)}"
    if kind in ("string_pattern_mismatch", "string_too_long"):
        about = _fields(root, key[:-1], tree.value).get(str(key[-1]))
        return f"{shown(found)} does not fit: {about}"
    if kind == "string_type":
        quotes = "; put it in quotes" if isinstance(found, (int, float)) else ""
        return f"expected text, found {shown(found)}{quotes}"
    if kind == "expected":
        return f"expected {context['what']}, found {shown(found)}"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, found {shown(found)}"
    return f"{detail['msg']}, found {shown(found)}"


def _choice(found: Any, options: list[str], literal: str = "", *, or_else: str = "") -> str:
    if not options:
        return f"expected {literal}, found {shown(found)}"
    hint = did_you_mean(found, options) if isinstance(found, str) else ""
    return f"{shown(found)} is not one of {', '.join(options)}{or_else}{hint}"


def _known_key(root: type[BaseModel], key: Key, value: Any) -> str:
    """Where an unknown key may belong: the same word elsewhere, a like word, or all words."""
    name, names = str(key[-1]), list(_fields(root, key[:-1], value))
    homes = list(_homes(root, name, ()))
    beside = [home for home in homes if home[: len(key) - 1] == key[:-1]] or homes
    if len(beside) in (1, 2):
        return f"; did you mean {' or '.join(repr(dotted(home)) for home in beside)}?"
    if close := did_you_mean(name, names):
        return close
    return f"; there are only {', '.join(names)}" if names else ""


def _homes(annotation: Any, name: str, above: Key) -> Iterator[Key]:
    for model in _models(annotation):
        for field, info in model.model_fields.items():
            if field == name:
                yield (*above, field)
            yield from _homes(info.annotation, name, (*above, field))


def shown(value: Any) -> str:
    """`value` as it may stand in the file, cut to about 60 characters."""
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, BaseModel):
        text = value.__class__.__name__
    else:
        text = "nothing" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _fields(root: type[BaseModel], key: Key, value: Any) -> dict[str, str]:
    """Name -> description of the fields that may stand at `key`, going by what stands there."""
    annotation: Any = root
    for part in key:
        value = _item(value, part)
        annotation = _below(annotation, part)
    models = list(_models(annotation))
    if len(models) > 1 and isinstance(value, Mapping):
        models = [m for m in models if value.get("name") in _tags(m)] or models
    return {
        name: field.description or ""
        for model in models
        for name, field in model.model_fields.items()
    }


def _item(value: Any, part: str | int) -> Any:
    if isinstance(value, Mapping):
        return value.get(part)
    if isinstance(value, (list, tuple)) and isinstance(part, int) and part < len(value):
        return value[part]
    return None


def _below(annotation: Any, part: str | int) -> Any:
    """The annotation of entry `part` of something annotated so; None if there is no such entry."""
    if get_origin(annotation) in (dict, Mapping):
        return get_args(annotation)[1]
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0]
    for model in _models(annotation):
        if part in model.model_fields:
            return model.model_fields[str(part)].annotation
    return None


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) not in (dict, Mapping, tuple):
        for inner in get_args(annotation):
            yield from _models(inner)


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    field = model.model_fields.get("name")
    return get_args(field.annotation) if field else ()
