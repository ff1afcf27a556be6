"""Options of trtexec and Polygraphy in scripts, read as the shell reads them.

Continuation lines, both kinds of quotes anywhere in a word, comments, variables that the file sets
itself, and several commands. Nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trtune.configs.errors import ConfigError
from trtune.precision.traces.engine_names import split_outside

TRTEXEC, POLYGRAPHY = "layerPrecisions", "layer-precisions"
OUTPUT_TYPES = ("layerOutputTypes", "tensor-dtypes", "tensor-datatypes")
CONTINUED = re.compile(r"[ \t]*[\\^`][ \t]*\r?\n")
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
ASSIGNED = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
TYPES = r"(?:fp|float|bf|bfloat|int)\d+|float|half"
COMPLETE = re.compile(rf".*:(?:{TYPES})(?:\+(?:{TYPES}))*", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class PinCommand:
    """What one command says of layers: `layer:precision` entries, output types, its words.

    `constrained`: whether it says that precisions are to be held to, without which trtexec does
    not look at them; None where that cannot be told.
    """

    words: tuple[str, ...]
    entries: tuple[str, ...] = ()
    output_types: tuple[str, ...] = ()
    constrained: bool | None = None

    def __str__(self) -> str:
        text = " ".join(self.words)
        return text if len(text) <= 100 else text[:97] + "..."


def commands_in(text: str) -> list[PinCommand]:
    """The commands of a script, or of one line of it, that have some option for layers.

    >>> commands_in('trtexec --onnx=a.onnx --layerPrecisions="/a/Conv":fp16,b:fp32')[0].entries
    ('/a/Conv:fp16', 'b:fp32')

    Raises ConfigError for a quote that is not closed.
    """
    found = (_command(words) for words in shell_commands(text))
    return [c for c in found if c.entries or c.output_types or _empty_option(c.words)]


def _empty_option(words: Sequence[str]) -> bool:
    return any(word in (f"--{TRTEXEC}", f"--{TRTEXEC}=", f"--{POLYGRAPHY}") for word in words)


def _command(words: Sequence[str]) -> PinCommand:
    entries: list[str] = []
    types: list[str] = []
    waiting = list(words)
    while waiting:
        option, equals, value = waiting.pop(0).partition("=")
        kind = option.removeprefix("--") if option.startswith("--") else ""
        if kind in (TRTEXEC, POLYGRAPHY, *OUTPUT_TYPES):
            given = [value] if equals else []
            while waiting and _goes_on(kind, given, waiting[0]):
                given.append(waiting.pop(0))
            if kind == POLYGRAPHY:
                found = [part for word in given for part in split_entries(word)]
            else:
                found = split_entries(" ".join(given))
            (types if kind in OUTPUT_TYPES else entries).extend(found)
    known = any(word.startswith(("--onnx", "--uff", "--loadEngine")) for word in words)
    held = any("recisionConstraints=" in w and not w.endswith("=none") for w in words)
    return PinCommand(tuple(words), tuple(entries), tuple(types), held if known else None)


def _goes_on(kind: str, given: Sequence[str], word: str) -> bool:
    """Whether `word` still belongs to the value: trtexec's is one word, unless a name has a blank
    that was not quoted."""
    if word.startswith("-"):
        return False
    return kind == POLYGRAPHY or not given or not COMPLETE.fullmatch(given[-1])


def split_entries(text: str) -> list[str]:
    """Entries divided by commas, quotes around names taken off.

    >>> split_entries("a:fp32, PWN(b, c):fp16,")
    ['a:fp32', 'PWN(b, c):fp16']
    """
    return [_unquoted(entry) for entry in split_outside(text, ",") if entry]


def _unquoted(entry: str) -> str:
    whole = re.fullmatch(r"(['\"])(.*)\1", entry, re.DOTALL)
    entry = whole[2] if whole else entry
    name = re.fullmatch(r"(['\"])(.*)\1(:[^:]*)", entry, re.DOTALL)
    return name[2] + name[3] if name else entry


def bare_entries(text: str) -> list[str]:
    """Entries of a text without options: lists with commas, blanks or a line each."""
    found: list[str] = []
    for line in without_comments(text).splitlines():
        try:
            words = [
                part for words in shell_commands(line) for w in words for part in split_entries(w)
            ]
        except ConfigError:
            words = []
        whole = bool(words) and all(COMPLETE.fullmatch(word) for word in words)
        found += words if whole else split_entries(line)
    return found


def without_comments(text: str) -> str:
    """`text` less the lines that are comments of a shell or a batch file."""
    kept = (line for line in text.splitlines(keepends=True) if not _is_comment(line))
    return "".join(kept)


def _is_comment(line: str) -> bool:
    return bool(re.match(r"\s*(#|::|rem\b)", line, re.IGNORECASE))


def shell_commands(text: str) -> list[list[str]]:
    """The words of every command in `text`, with the variables that it sets put in.

    >>> shell_commands("a 'b c'd; N=1 # no\\ne --x=$N")
    [['a', 'b cd'], ['e', '--x=1']]

    Raises ConfigError for a quote that is not closed.
    """
    known: dict[str, str] = {}
    found: list[list[str]] = []
    for words in _split(CONTINUED.sub(" ", without_comments(text))):
        put_in = [VARIABLE.sub(lambda m: known.get(m[1] or m[2], m[0]), word) for word in words]
        while put_in and (assigned := ASSIGNED.fullmatch(put_in[0])):
            known[assigned[1]] = assigned[2]
            put_in.pop(0)
            if put_in[:1] == ["export"]:
                put_in.pop(0)
        if put_in[:1] == ["export"]:
            known.update((m[1], m[2]) for w in put_in[1:] if (m := ASSIGNED.fullmatch(w)))
            put_in = []
        if put_in:
            found.append(put_in)
    return found


def _split(text: str) -> Iterator[list[str]]:
    """Words of one command after the other."""
    words: list[str] = []
    word: str | None = None
    quote, at = "", 0
    while at < len(text):
        letter, after = text[at], text[at + 1 : at + 2]
        at += 1
        if quote:
            escaped = quote == '"' and letter == "\\" and after in ('"', "\\", "$", "`")
            if letter == quote:
                quote = ""
            else:
                word = (word or "") + (after if escaped else letter)
                at += escaped
        elif letter in "'\"":
            quote, word = letter, word or ""
        elif letter == "\\" and after:
            word, at = (word or "") + after, at + 1
        elif letter.isspace() or letter in ";&|" or (letter == "#" and word is None):
            if word is not None:
                words.append(word)
                word = None
            if letter == "#":
                end = text.find("\n", at)
                at = len(text) if end < 0 else end
            elif letter in "\n;&|" and words:
                yield words
                words = []
        else:
            word = (word or "") + letter
    if quote:
        raise ConfigError("cannot read the list of pinned layers: No closing quotation")
    if word is not None:
        words.append(word)
    if words:
        yield words
