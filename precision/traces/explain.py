"""A build log read: what happened, at which ONNX node, and what to do about it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from trtune.precision.graph.view import GraphView
from trtune.precision.traces.engine_names import nodes_of_layer, parts_of
from trtune.precision.traces.messages import MESSAGES, NOTE, PROBLEM, Message

PREFIX = re.compile(
    r"^(?:\[[\d/:. -]+\] )?(?:\[(?P<severity>[A-Z_]+)\] )?(?:\[TRT\] )?(?P<text>.*)"
)
LAYER = re.compile(r"^Layer\((?P<kind>[^)]*)\): (?P<name>.+), Tactic: [^,]*, (?P<io>.* -> .*)$")
TYPE = re.compile(r"\((?P<type>Int8|Half|Float|BFloat16|BF16|FP8|Int32|Int64|Bool)\[")
TYPES = {"Int8": "int8", "Half": "fp16", "Float": "fp32", "BFloat16": "bf16", "BF16": "bf16",
         "FP8": "fp8"}  # fmt: skip
VERSION = re.compile(r"TensorRT(?:\.trtexec)? ?(?:\[TensorRT )?v(?:ersion)?:? ?(?P<version>[\d.]+)")
BAD = ("E", "F", "W", "ERROR", "INTERNAL_ERROR", "WARNING")


@dataclass(frozen=True, slots=True)
class LogEvent:
    """One kind of message at one place: how often, where first, what it means, what to do."""

    key: str
    kind: str
    what: str
    remedy: str
    nodes: tuple[str, ...]
    line: int
    count: int
    seen: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "key": self.key, "kind": self.kind, "what": self.what, "remedy": self.remedy,
            "nodes": list(self.nodes), "line": self.line, "count": self.count, "seen": self.seen,
        }  # fmt: skip

    def __str__(self) -> str:
        who = f" [{', '.join(self.nodes[:3])}]" if self.nodes else ""
        return f"{self.what}{who}. {self.remedy}"


@dataclass(frozen=True, slots=True)
class LogAccount:
    """A log: TensorRT's version if it says it, the events in order of their lines, and what the
    layers run in, if it lists them (verbose logs do)."""

    version: str
    lines: int
    events: tuple[LogEvent, ...]
    layers: tuple[tuple[str, str, str], ...] = ()

    @property
    def problems(self) -> tuple[LogEvent, ...]:
        """The events that something should be done about."""
        return tuple(event for event in self.events if event.kind == PROBLEM)

    def notes(self) -> dict[str, int]:
        """How often each kind of note occurs."""
        found: Counter[str] = Counter()
        for event in self.events:
            if event.kind == NOTE:
                found[event.key] += event.count
        return dict(found)

    def precisions(self) -> dict[str, int]:
        """How many layers with weights run in each precision."""
        return dict(Counter(p for kind, _, p in self.layers if kind.startswith(WEIGHTED_KINDS)))


WEIGHTED_KINDS = (
    "CaskConv",
    "CaskGemm",
    "CudaDepthwise",
    "Fused",
    "Conv",
    "Gemm",
    "gemm",
    "correlation",
    "MatrixMultiply",
)


def explain_log(text: str, view: GraphView | None = None) -> LogAccount:
    """What the log of a build or of trtexec says; with `view` at which nodes of the model.

    Errors and warnings that no message of the table explains are given as they stand.
    """
    lines = text.splitlines()
    version = next((m["version"] for line in lines if (m := VERSION.search(line))), "")
    return LogAccount(
        version=_dotted(version),
        lines=len(lines),
        events=tuple(_merged(_events(lines, view))),
        layers=tuple(_layers(lines)),
    )


def _dotted(version: str) -> str:
    """8502 as 8.5.2, 101401 as 10.14.1."""
    if not version.isdigit():
        return version
    major, rest = divmod(int(version), 10000 if int(version) >= 100000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _events(lines: Iterable[str], view: GraphView | None) -> Iterator[LogEvent]:
    for number, line in enumerate(lines, start=1):
        parsed = PREFIX.match(line)
        text = parsed["text"].strip() if parsed else line
        found = match_message(text)
        if found is not None:
            message, words = found
            what = message.what.format(**words)
            remedy = message.remedy.format(**words)
            nodes = _nodes(words, view)
            yield LogEvent(message.key, message.kind, what, remedy, nodes, number, 1, message.seen)
        elif parsed and parsed["severity"] in BAD and text:
            yield LogEvent("not explained", PROBLEM, text, "The table of messages does not know it",
                        (), number, 1)  # fmt: skip


def match_message(text: str) -> tuple[Message, dict[str, str]] | None:
    """The first message of the table that `text` is, and what it names; None if it is none."""
    for message in MESSAGES:
        found = re.search(message.pattern, text)
        if found:
            return message, {k: (v or "").strip() for k, v in found.groupdict().items()}
    return None


def _nodes(words: dict[str, str], view: GraphView | None) -> tuple[str, ...]:
    node, tensor = words.get("node", ""), words.get("tensor", "")
    if view is None:
        return parts_of(node) if node else ()
    if node:
        return nodes_of_layer(node, view)
    if tensor in view.producer:
        return (view.producer[tensor],)
    return tuple(dict.fromkeys(name for name, _ in view.consumers.get(tensor, ())))


def _merged(events: Iterable[LogEvent]) -> list[LogEvent]:
    """Equal events as one, at the place of the first, with their number."""
    found: dict[tuple[str, str], LogEvent] = {}
    for event in events:
        key = (event.key, event.what)
        first = found.get(key, event)
        count = first.count + 1 if key in found else 1
        found[key] = replace(first, count=count)
    return list(found.values())


def _layers(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(kind, name, precision of what it reads) of the layers that a verbose log lists."""
    for line in lines:
        parsed = LAYER.match(line)
        if parsed:
            reads, _, writes = parsed["io"].partition(" -> ")
            kinds = [TYPES.get(t, "") for t in (*TYPE.findall(reads), *TYPE.findall(writes))]
            yield parsed["kind"], parsed["name"], next((k for k in kinds if k), "unknown")
