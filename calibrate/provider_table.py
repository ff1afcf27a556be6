"""Calibration tables of onnxruntime's TensorRT execution provider, which are no TensorRT caches.

`onnxruntime.quantization.write_calibration_table` writes the same ranges (the largest magnitude of
each tensor, not its scale) three times: as lines `<tensor> <number>`, as JSON and as FlatBuffers.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from typing import Any

from trtune.configs.errors import CacheError

PROVIDER = "onnxruntime's TensorRT execution provider"
LINE = re.compile(r"(?P<name>.+) (?P<amax>[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|inf|nan))")


def read_provider_table(data: str | bytes) -> dict[str, float] | None:
    """Tensor -> largest magnitude from one of the three forms; None if `data` is none of them.

    A range that is infinite or no number is inf. FlatBuffers only from bytes.

    >>> read_provider_table("conv1 2.5\\nrelu: 1 0.5\\n")
    {'conv1': 2.5, 'relu: 1': 0.5}
    >>> read_provider_table("TRT-8601-EntropyCalibration2\\nx: 3f800000\\n")

    Raises CacheError for JSON that is no such table.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
    except UnicodeDecodeError:
        return _from_flatbuffers(data) if isinstance(data, bytes) else None
    if "\0" in text:
        return _from_flatbuffers(text.encode("utf-8"))
    if text.lstrip("\ufeff \n\r\t").startswith("{"):
        return _from_json(text)
    lines = [line for line in text.splitlines() if line.strip()]
    found = [LINE.fullmatch(line) for line in lines]
    if not lines or not all(found) or all(m and m["name"].endswith(":") for m in found):
        return None
    return {m["name"]: _magnitude([float(m["amax"])]) for m in found if m}


def _from_json(text: str) -> dict[str, float]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CacheError(f"neither a calibration cache nor JSON: {error}") from error
    found: dict[str, float] = {}
    for name, entry in value.items():
        numbers = _numbers(entry)
        if numbers:
            found[str(name)] = _magnitude(numbers)
    if not found:
        raise CacheError(
            "this JSON holds no range of a tensor; expected what onnxruntime writes as "
            "calibration.json"
        )
    return found


def _numbers(entry: Any) -> list[float]:
    """The numbers that say a range: [low, high], or what is called lowest and highest."""
    if isinstance(entry, bool):
        return []
    if isinstance(entry, (int, float)):
        return [float(entry)]
    if isinstance(entry, list):
        return [number for part in entry for number in _numbers(part)]
    if isinstance(entry, Mapping):
        kept = [entry[key] for key in ("lowest", "highest", "data") if key in entry]
        return [number for part in kept for number in _numbers(part)]
    return []


def _magnitude(numbers: list[float]) -> float:
    largest = max((abs(number) for number in numbers), default=0.0)
    return math.inf if any(math.isnan(n) for n in numbers) else largest


def _from_flatbuffers(data: bytes) -> dict[str, float] | None:
    """The table in `data`; None if it is something else (FlatBuffers have no signature)."""
    from onnxruntime.quantization.CalTableFlatBuffers.TrtTable import TrtTable

    try:
        table = TrtTable.GetRootAsTrtTable(data, 0)
        entries = [table.Dict(index) for index in range(table.DictLength())]
        pairs = [(entry.Key(), entry.Value()) for entry in entries]
        return {k.decode("utf-8"): _magnitude([float(v)]) for k, v in pairs} or None
    except (struct.error, ValueError, TypeError, AttributeError, IndexError, UnicodeDecodeError):
        return None


def dump_provider_table(ranges: Mapping[str, float]) -> bytes:
    """Tensor -> largest magnitude as FlatBuffers, the form that the provider itself reads.

    Numbers are written so that reading gives the same float32. Tensors without a finite range are
    left out: to the provider they have none then.

    >>> read_provider_table(dump_provider_table({"conv1": 2.5, "a: b": 0.5, "mask": math.inf}))
    {'a: b': 0.5, 'conv1': 2.5}
    """
    import flatbuffers
    from onnxruntime.quantization.CalTableFlatBuffers import KeyValue, TrtTable

    builder = flatbuffers.Builder(1024)
    entries = []
    for name in sorted(name for name, amax in ranges.items() if math.isfinite(amax)):
        key = builder.CreateString(name)
        value = builder.CreateString(f"{ranges[name]:.9g}")
        KeyValue.KeyValueStart(builder)
        KeyValue.KeyValueAddKey(builder, key)
        KeyValue.KeyValueAddValue(builder, value)
        entries.append(KeyValue.KeyValueEnd(builder))
    TrtTable.TrtTableStartDictVector(builder, len(entries))
    for entry in reversed(entries):  # a vector is filled from its end
        builder.PrependUOffsetTRelative(entry)
    vector = builder.EndVector()
    TrtTable.TrtTableStart(builder)
    TrtTable.TrtTableAddDict(builder, vector)
    builder.Finish(TrtTable.TrtTableEnd(builder))
    return bytes(builder.Output())
