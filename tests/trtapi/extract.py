"""Writes trt-10.json and trt-11.json here, from full snapshots of the two bindings.

    python tests/trtapi/extract.py SNAPSHOT_OF_10.json SNAPSHOT_OF_11.json

A snapshot is what introspection of the real `tensorrt` package gave: every public name with its
members, signatures and enum values. What is kept: all names with their enum values or members, and
for the classes in DOUBLED also signatures and which properties can be written.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

DOUBLED = (
    *("Builder", "IBuilderConfig", "INetworkDefinition", "ILayer", "ITensor"),
    *("OnnxParser", "ParserError", "Runtime", "ICudaEngine", "IExecutionContext"),
    *("EngineInspector", "ILogger", "Logger", "IOptimizationProfile", "ITimingCache"),
    *("IInt8Calibrator", "IInt8EntropyCalibrator2", "IInt8MinMaxCalibrator", "IHostMemory"),
)
IGNORED = ("__del__", "__enter__", "__exit__")


def shortened(text: str) -> str:
    """A signature without the names of modules."""
    text = re.sub(r"tensorrt_bindings\.tensorrt\.|typing_extensions\.|typing\.", "", text)
    return re.sub(r"collections\.abc\.|nvinfer1::v_1_0::|nvinfer1::|nvonnxparser::", "", text)


def member(value: dict[str, Any]) -> Any:
    """A property as {"get": type, "set": type or null}, a method as its signatures, else a word."""
    if value["kind"] == "property":
        written = re.search(r", \w+: (.*)\) ->", shortened(value["setter"] or ""))
        read = shortened(str(value["getter"])).rpartition("-> ")[2]
        kind = written[1] if written else "object"
        return {"get": read, "set": None if value["readonly"] else kind}
    if value["kind"] in ("method", "staticmethod"):
        return [shortened(text) for text in value["sig"]]
    return value["kind"]


def entry(name: str, value: dict[str, Any]) -> Any:
    """What is kept of one public name."""
    if value["kind"] == "enum":
        return {"enum": value["enum"]}
    if value["kind"] != "class":
        return value["kind"]
    members = {k: v for k, v in value["members"].items() if k not in IGNORED}
    if name not in DOUBLED:
        return {"members": sorted(members)}
    nested = {
        k: {"enum": v["class"]["enum"]}
        for k, v in members.items()
        if v["kind"] == "nested" and "class" in v
    }
    kept = {k: member(v) for k, v in members.items() if k not in nested}
    return {"bases": value["bases"], "members": kept, "nested": nested}


def compact(snapshot: dict[str, Any]) -> dict[str, Any]:
    """The part of a snapshot that the tests use."""
    names = {name: entry(name, value) for name, value in sorted(snapshot["names"].items())}
    return {"version": snapshot["version"], "names": names}


if __name__ == "__main__":
    for source, target in zip(sys.argv[1:], ("trt-10.json", "trt-11.json"), strict=True):
        value = compact(json.loads(Path(source).read_text("utf-8")))
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value["names"].items()]
        body = ",\n".join(lines)
        text = f'{{"version": {json.dumps(value["version"])}, "names": {{\n{body}\n}}}}\n'
        (Path(__file__).parent / target).write_text(text, "utf-8")
