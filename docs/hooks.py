"""What MkDocs is told beside the pages: the references, and results that lie outside of docs/.

The config's reference is written from its schema and the command line's from the commands, so that
neither can say what is no longer so.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.nav import Navigation
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = ("benchmarks/README.md", "benchmarks/results/*.md", "examples/*/README.md")
"""Pages of the site that lie beside docs/, where their readers in the repository look for them."""
SECTIONS = {"benchmarks": "Measured", "examples": "Examples"}
"""The heading that a folder's pages stand below."""
LINK = re.compile(r"\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are written here."""
    from mkdocs.structure.files import File

    pages = {name: write() for name, write in WRITTEN.items()}
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            pages[path.relative_to(ROOT).as_posix()] = path.read_text("utf-8")
    for name, text in pages.items():
        standing = files.get_file_from_path(name)  # what the repository shows in its place
        if standing is not None:
            files.remove(standing)
        files.append(File.generated(config, name, content=text))
    return files


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """List what mkdocs.yml does not: examples and measurements, and other pages below Jobs."""
    from mkdocs.structure.nav import Section
    from mkdocs.structure.pages import Page

    sections = {item.title: item for item in nav.items if isinstance(item, Section)}
    listed = {page.file.src_uri for page in nav.pages}
    for file in files.documentation_pages():
        if file.src_uri not in listed:
            section = sections[SECTIONS.get(file.src_uri.partition("/")[0], "Jobs")]
            page = Page(None, file, config)
            page.parent = section
            section.children.append(page)
            nav.pages.append(page)
    return nav


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository become links of the site, or words where it has no page."""
    source = page.file.src_uri
    in_docs = (ROOT / "docs" / source).is_file()
    known = {file.src_uri for file in files}
    return relinked(markdown, f"docs/{source}" if in_docs else source, known)


def relinked(markdown: str, source: str, known: set[str]) -> str:
    """`markdown` of the file `source` (seen from the root) with its links as the site has them.

    `known` are the site's files, seen from docs/. A link to what is in the repository alone
    leaves its words.
    """
    page = source.removeprefix("docs/")

    def link(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        here = path.removeprefix("docs/")
        if here in known:
            return f"]({posixpath.relpath(here, posixpath.dirname(page) or '.')}{anchor})"
        return "]()" if (ROOT / path).exists() else match[0]

    text = LINK.sub(link, markdown)
    return re.sub(r"(?<!!)\[([^\]]*)\]\(\)", r"\1", text)


def config_reference() -> str:
    """Every section and key of the config, with its type, default and meaning, as Markdown."""
    from trtune.configs.load import json_schema

    schema = json_schema()
    definitions: Mapping[str, Any] = schema["$defs"]
    parts = [
        "# Config",
        "Written from the schema that `trtune schema` prints. Paths are relative to the file that "
        "they stand in; `${VAR}` and `${VAR:-default}` are filled in from the environment; "
        "`extends` brings in other files or presets, and what stands later wins. "
        "`--set key.path=value` changes a key for one run.",
        _section("the file", "", schema, definitions),
    ]
    for name, path in _sections(schema, definitions):
        parts.append(_section(name, path, definitions[name], definitions))
    return "\n\n".join(parts) + "\n"


def _sections(
    schema: Mapping[str, Any], definitions: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """The named sections that can be reached from the top, each once, with where it stands."""
    seen: set[str] = set()
    queue = [("", schema)]
    while queue:
        path, section = queue.pop(0)
        for key, value in section.get("properties", {}).items():
            for name in _references(value):
                if name in definitions and "properties" in definitions[name] and name not in seen:
                    seen.add(name)
                    place = f"{path}.{key}".strip(".")
                    yield name, place
                    queue.append((place, definitions[name]))


def _references(value: Any) -> Iterator[str]:
    """Names of the definitions that a schema refers to, in order."""
    if isinstance(value, Mapping):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"].rpartition("/")[2]
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _section(
    name: str, path: str, schema: Mapping[str, Any], definitions: Mapping[str, Any]
) -> str:
    title = f"`{path}`" if path else "Top level"
    if path and name in ("OnnxRuntime", "TensorRT", "TensorRTRTX"):
        title = f"`backends`: {schema['properties']['name']['const']}"
    lines = [f"## {title} {{ #{name.lower().replace(' ', '-')} }}"]
    if schema.get("description") and path:
        lines += [" ".join(str(schema["description"]).split())]
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for key, value in schema.get("properties", {}).items():
        meaning = str(value.get("description", "")).replace("|", "\\|").replace("\n", " ")
        kind = _type(value, definitions).replace("|", "\\|")
        rows.append(f"| `{key}` | {kind} | {_default(value)} | {meaning} |")
    return "\n\n".join([*lines, "\n".join(rows)])


def _default(value: Mapping[str, Any]) -> str:
    default = value.get("default")
    if "default" not in value or (isinstance(default, dict) and default):
        return ""
    if isinstance(default, list) and any(isinstance(entry, dict) for entry in default):
        return "as below"
    return f"`{_yaml(value['default'])}`"


def _yaml(value: Any) -> str:
    from trtune.configs.yamltree import inline_yaml

    return str(inline_yaml(value))


def _type(value: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A schema in words: its names, or what it may hold."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        inner = definitions[name]
        return f"[section](#{name.lower()})" if "properties" in inner else _type(inner, definitions)
    if "const" in value:
        return f"`{_yaml(value['const'])}`"
    if "enum" in value:
        return ", ".join(f"`{_yaml(word)}`" for word in value["enum"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in value:
            kinds = [_type(v, definitions) for v in value[key] if _speaks(v)]
            return " or ".join(dict.fromkeys(filter(None, kinds)))
    if value.get("type") == "array":
        inside = value.get("items", value.get("prefixItems", [{}]))
        inner = inside[0] if isinstance(inside, list) else inside
        return f"list of {_type(inner, definitions)}".replace("list of any", "list")
    if value.get("type") == "object":
        inner = value.get("additionalProperties")
        return f"name: {_type(inner, definitions)}" if isinstance(inner, Mapping) else "mapping"
    words = {"string": "text", "integer": "whole number", "boolean": "true, false"}
    kind = value.get("type", "any")
    kinds = kind if isinstance(kind, list) else [kind]
    return " or ".join(words.get(word, word) for word in kinds)


def _speaks(value: Mapping[str, Any]) -> bool:
    """Whether an alternative says something to a reader: not the `${VARIABLE}` that any may be."""
    return not str(value.get("$ref", "")).endswith("/Variable")


def message_reference() -> str:
    """What `trtune explain` knows of TensorRT's messages, as Markdown."""
    from trtune.precision.traces.messages import MESSAGES

    rows = [
        f"| {_cell(m.key)} | {_cell(_placeholders(m.what))} | {_cell(_placeholders(m.remedy))} "
        f"| {_cell(m.seen)} |"
        for m in MESSAGES
    ]
    return "\n".join(
        [
            "# What TensorRT says",
            "",
            "The messages that `trtune explain LOG` knows. *Seen* is where the words were met: in "
            'logs that were read for this project, or in public reports ("reported"). A message '
            "that is not known is shown as it stands.",
            "",
            "| message | what it means | what to do | seen |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def finding_reference() -> str:
    """What `trtune qdq lint` finds, and what TensorRT does with each, as Markdown."""
    from trtune.precision.quantized.findings import SEVERITY, TENSORRT

    rows = [f"| `{kind}` | {SEVERITY[kind]} | {_cell(TENSORRT[kind])} |" for kind in SEVERITY]
    return "\n".join(
        [
            "# What the linter finds",
            "",
            "The kinds of findings of `trtune qdq lint`. An error keeps the model from being used "
            "as it is unless it is repaired; `qdq lint` says of each node what was found and what "
            "was done. What TensorRT does was seen with TensorRT-RTX 1.7 where it could be tried.",
            "",
            "| finding | severity | TensorRT |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def _placeholders(text: str) -> str:
    """`{node}` as NODE; doubled braces are braces."""
    named = re.sub(r"(?<!\{)\{(\w+)\}(?!\})", lambda m: m[1].upper(), text)
    return named.replace("{{", "{").replace("}}", "}")


def _cell(text: str) -> str:
    """`text` in a cell of a table, where `<`, `|` and line ends would end it."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def command_reference() -> str:
    """Every command with its help, as a terminal of 96 columns without colours shows it."""
    import typer.main
    from typer.testing import CliRunner

    from trtune.cli.commands import app

    os.environ.pop("FORCE_COLOR", None)
    runner = CliRunner(
        env={"NO_COLOR": "1", "COLUMNS": "96", "TERMINAL_WIDTH": "96", "TERM": "dumb"}
    )
    parts = [
        "# Command line",
        "`trtune` or `python -m trtune`. `trtune --install-completion` completes commands in your "
        "shell. Exit status: 0 done and target met, 3 done and target missed (the best model is "
        "written), 2 the input is wrong, 1 anything else, 130 interrupted.",
    ]
    for words in _commands(typer.main.get_command(app), ()):
        shown = runner.invoke(app, [*words, "--help"], prog_name="trtune").output
        text = "\n".join(line.rstrip() for line in shown.strip("\n").splitlines())
        parts.append(f"## trtune {' '.join(words)}".rstrip() + f"\n\n```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, (*words, name))


WRITTEN = {
    "config.md": config_reference,
    "commands.md": command_reference,
    "messages.md": message_reference,
    "findings.md": finding_reference,
}
"""Pages that are written from the code; in docs/ a few lines stand in their place."""
