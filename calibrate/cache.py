"""TensorRT's calibration cache: the text format, and the key that says what a cache was made from.

A cache is ASCII in TensorRT's own use; names in UTF-8 pass through it unharmed. The first line is
`TRT-<version>-<algorithm>`, every other one `<tensor>: <hex>`, the scale as a big-endian float32
without leading zeros. TensorRT ignores a file whose header is not its own and calibrates again, so
a cache that shall be used elsewhere needs `convert`.

A scale of infinity or NaN is normal where attention masks or reciprocals pass: TensorRT writes it,
and treats the tensor as one without a scale.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trtune.calibrate.provider_table import PROVIDER, read_provider_table
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import CacheError, nearest
from trtune.configs.files import hash_bytes, hash_json, write_bytes, write_json

ALGORITHMS = (
    "EntropyCalibration2",
    "EntropyCalibration",
    "MinMaxCalibration",
    "LegacyCalibration",
)
Version = tuple[int, int, int]
DEFAULT_HEADER = "TRT-101401-EntropyCalibration2"
INFINITE = "7f800000"
"""How TensorRT writes that no range was found."""


@dataclass(frozen=True, slots=True)
class Cache:
    """A calibration cache: its header line, and tensor -> scale (= amax / 127) in file order.

    `no_range` are the tensors whose scale is infinite or NaN: TensorRT treats them as if they had
    none. `words` (every tensor's hex digits in file order), `newline` and `end` are how a file
    wrote it, so that it can be written again byte for byte. `origin` is what wrote it, if that was
    not TensorRT; its header is then the one that it would be given.
    """

    header: str
    scales: Mapping[str, float] = field(default_factory=dict)
    no_range: tuple[str, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict, compare=False)
    newline: str = field(default="\n", compare=False)
    end: str | None = field(default=None, compare=False)
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", MappingProxyType(dict(self.scales)))
        object.__setattr__(self, "words", MappingProxyType(dict(self.words)))

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor with an entry, those without a range too, in file order."""
        return tuple(dict.fromkeys([*self.words, *self.scales, *self.no_range]))

    @property
    def text_lines(self) -> tuple[str, ...]:
        """The entries as they stand in the file. Raises ValueError for what it cannot hold."""
        known = {*self.scales, *self.no_range}
        return tuple(_line(self, name) for name in self.names if name in known)

    @property
    def version(self) -> Version:
        """The TensorRT version that the header names."""
        return parse_header(self.header)[0]

    @property
    def algorithm(self) -> str:
        """The calibration algorithm that the header names."""
        return parse_header(self.header)[1]


def header_for(version: Version, algorithm: str = "EntropyCalibration2") -> str:
    """The header line of a TensorRT version: two digits a part from 10.0, one for major before.

    >>> header_for((8, 6, 1), "EntropyCalibration2")
    'TRT-8601-EntropyCalibration2'
    >>> header_for((10, 14, 1), "MinMaxCalibration")
    'TRT-101401-MinMaxCalibration'

    Raises ValueError if a part of the version has no place in the number.
    """
    major, minor, patch = version
    if not (major > 0 and 0 <= minor < (100 if major >= 10 else 10) and 0 <= patch < 100):
        raise ValueError(f"no TensorRT header can hold version {version}")
    scale = 10000 if major >= 10 else 1000
    return f"TRT-{major * scale + minor * 100 + patch}-{algorithm}"


def parse_header(header: str) -> tuple[Version, str]:
    """Version and algorithm of a header line.

    >>> parse_header("TRT-8601-EntropyCalibration2")
    ((8, 6, 1), 'EntropyCalibration2')
    >>> parse_header("TRT-101401-EntropyCalibration2")
    ((10, 14, 1), 'EntropyCalibration2')

    Raises CacheError if it is not one.
    """
    match = re.fullmatch(r"TRT-(\d{4,7})-(\w+)", header)
    if re.fullmatch(r"\d+|[A-Za-z]+Calibration2?", header.strip()):
        raise CacheError(
            f"line 1: {_quoted(header)} is the header of a cache of TensorRT before 5.0, whose "
            "scales were taken after layers were fused; no later version reads it. Calibrate again"
        )
    if not match:
        raise CacheError(
            f"line 1: expected a header such as {DEFAULT_HEADER!r}, found {_quoted(header)}; "
            "this is not a TensorRT calibration cache"
        )
    number = int(match[1])
    major, rest = divmod(number, 10000 if number >= 100000 else 1000)
    minor, patch = divmod(rest, 100)
    return (major, minor, patch), match[2]


def parse_cache(text: str) -> Cache:
    """Read the text of a calibration cache.

    A name may itself hold ': ', so a line is split at its last one. Line ends of Windows and blank
    lines at the end are accepted, and kept. Infinity and NaN of either sign are no range. The
    plain table of onnxruntime's TensorRT execution provider is read too.

    >>> parse_cache(dump_cache(Cache("TRT-101300-EntropyCalibration2", {"a: b": 0.5}))).scales
    mappingproxy({'a: b': 0.5})

    Raises CacheError with the line's number and text if a line is malformed, a name stands twice,
    or a scale is negative.
    """
    text = text.removeprefix("\ufeff")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise CacheError("the calibration cache is empty: not even a header line")
    provided = read_provider_table(text)
    if provided is not None:
        return _of_provider(provided)
    parse_header(lines[0])
    words: dict[str, str] = {}
    scales: dict[str, float] = {}
    first: dict[str, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        name, word, scale = _entry(number, line)
        if name in first:
            raise CacheError(
                f"line {number}: {name!r} already has a scale in line {first[name]}; "
                f"remove one of them. Found {_quoted(line)}"
            )
        words[name], first[name] = word, number
        if math.isfinite(scale):
            scales[name] = scale
    newline = "\r\n" if "\r\n" in text else "\n"
    end = text[len(text.rstrip("\r\n")) :] if not text.endswith(" ") else newline
    none = tuple(name for name in words if name not in scales)
    return Cache(lines[0], scales, none, words, newline, end)


def _entry(number: int, line: str) -> tuple[str, str, float]:
    """Name, hex digits and scale of a line."""
    name, separator, word = line.rpartition(": ")
    if not separator or not name or not re.fullmatch(r"[0-9a-fA-F]{1,8}", word):
        raise CacheError(
            f"line {number}: expected '<tensor>: <1 to 8 hex digits>', found {_quoted(line)}"
        )
    scale = _value(word)
    if math.isfinite(scale) and math.copysign(1, scale) < 0:
        raise CacheError(
            f"line {number}: the scale of {name!r} is {scale}; scales are not negative. "
            f"Found {_quoted(line)}"
        )
    return name, word, scale


def _value(word: str) -> float:
    (scale,) = struct.unpack(">f", bytes.fromhex(word.zfill(8)))
    return float(scale)


def _of_provider(ranges: Mapping[str, float]) -> Cache:
    """Ranges of onnxruntime's table as scales, divided in float32 as everywhere."""
    table = {t: r for t, r in ranges.items() if math.isfinite(r)}
    scales = CalibrationTable.from_amax(table).scales
    none = tuple(name for name in ranges if name not in scales)
    return Cache(DEFAULT_HEADER, scales, none, origin=PROVIDER)


def dump_cache(cache: Cache) -> str:
    """The text that TensorRT reads; `parse_cache` gives the same cache back.

    >>> dump_cache(Cache("TRT-8601-EntropyCalibration2", {"x": 1.0, "never seen": 0.0}))
    'TRT-8601-EntropyCalibration2\\nx: 3f800000\\nnever seen: 0\\n'

    Raises ValueError for a name or scale that the format cannot hold.
    """
    end = cache.newline if cache.end is None else cache.end
    return cache.newline.join([cache.header, *cache.text_lines]) + end


def _line(cache: Cache, name: str) -> str:
    """The entry of `name`, with the digits that were read if they still say its scale."""
    if not name or "\n" in name:
        raise ValueError(f"a cache cannot hold the tensor name {name!r}")
    read = cache.words.get(name)
    scale = cache.scales.get(name)
    if scale is None:
        return f"{name}: {INFINITE if read is None else read}"
    if not math.isfinite(scale) or scale < 0:
        raise ValueError(f"a cache cannot hold the scale {scale} of {name!r}")
    if read is not None and _value(read) == scale:
        return f"{name}: {read}"
    (word,) = struct.unpack(">I", struct.pack(">f", abs(scale)))
    return f"{name}: {word:x}"


def convert(cache: Cache, version: Version) -> Cache:
    """The same scales under the header of another TensorRT version.

    Everything else stays as it was read, byte for byte. Only caches of EntropyCalibration2 and
    MinMaxCalibration mean the same everywhere: TensorRT takes them before it fuses layers. Raises
    CacheError for the other algorithms.
    """
    if cache.algorithm not in ("EntropyCalibration2", "MinMaxCalibration"):
        raise CacheError(
            f"a cache of {cache.algorithm} was made after TensorRT fused layers, so it fits only "
            "the version and GPU it came from; calibrate again instead of converting it"
        )
    return replace(cache, header=header_for(version, cache.algorithm), origin="")


@dataclass(frozen=True, slots=True)
class CacheDifference:
    """One tensor of two caches: a scale is None where the tensor is missing, inf without a range.

    `ratio` is b / a; None if one is missing or has no range, inf if only a is zero.
    """

    tensor: str
    a: float | None
    b: float | None
    ratio: float | None


def diff(a: Cache, b: Cache) -> list[CacheDifference]:
    """Every tensor whose scales differ: missing ones first, then by how far the ratio is from 1.

    >>> rows = diff(Cache("TRT-8601-MinMaxCalibration", {"x": 1.0, "y": 1.0}),
    ...             Cache("TRT-8601-MinMaxCalibration", {"x": 2.0, "y": 1.0}))
    >>> [(row.tensor, row.ratio) for row in rows]
    [('x', 2.0)]
    """
    rows = []
    for tensor in dict.fromkeys([*a.names, *b.names]):
        left, right = _scale_in(a, tensor), _scale_in(b, tensor)
        if left == right:
            continue
        ratio = None
        if left is not None and right is not None and math.inf not in (left, right):
            ratio = right / left if left else math.inf
        rows.append(CacheDifference(tensor, left, right, ratio))

    def distance(row: CacheDifference) -> tuple[float, float, str]:
        if row.ratio is None:
            return (0, 0, row.tensor)
        return (1, -abs(math.log(row.ratio)) if row.ratio else -math.inf, row.tensor)

    return sorted(rows, key=distance)


def _scale_in(cache: Cache, tensor: str) -> float | None:
    return math.inf if tensor in cache.no_range else cache.scales.get(tensor)


def sidecar_of(path: Path) -> Path:
    """Where the key and provenance of the cache at `path` stand."""
    return Path(path).with_name(Path(path).name + ".json")


def save_table(path: Path, table: CalibrationTable, header: str = DEFAULT_HEADER) -> None:
    """Write `table` as a TensorRT cache, and what that cannot hold beside it.

    The sidecar holds the hash of the cache's text, and is written first: whenever the two do not
    belong together, because the process died between them or someone edited the cache, the hash
    says so and `load_table` refuses.

    Raises TrtuneError if the files cannot be written.
    """
    parse_header(header)
    data = dump_cache(Cache(header, table.scales)).encode("utf-8")
    write_json(
        sidecar_of(path),
        {
            "schema": 1,
            "cache_sha256": hash_bytes(data),
            "key": hash_json(dict(table.provenance)),
            "provenance": dict(table.provenance),
            "methods": dict(table.methods),
            **({"factors": dict(table.factors)} if table.factors else {}),
            **table.imported(),
        },
    )
    write_bytes(Path(path), data)


def read_cache(path: Path) -> Cache:
    """Read the cache file at `path`; raises CacheError with the path in front."""
    return _parse_bytes(Path(path), _read_bytes(Path(path)))


def load_table(path: Path, *, allow_unkeyed: bool = False) -> CalibrationTable:
    """Read a cache as a table, with what its sidecar adds to the scales.

    A cache without one says nothing about the model and data it was made from: it is refused
    unless `allow_unkeyed`, and then has the provenance {"source": "unkeyed"}.

    Raises CacheError if the cache is malformed, has no entry, or does not match its sidecar.
    """
    path = Path(path)
    data = _read_bytes(path)
    cache = _parse_bytes(path, data)
    if not cache.scales:
        raise CacheError(f"{path} holds a header and no scale; calibrate again")
    sidecar = _read_sidecar(path)
    matches = sidecar is not None and sidecar["cache_sha256"] == hash_bytes(data)
    if sidecar is not None and matches:
        return _with_sidecar(path, cache, sidecar)
    if allow_unkeyed:
        return CalibrationTable(cache.scales, provenance={"source": "unkeyed"})
    if sidecar is None:
        why = f"there is no {sidecar_of(path).name} beside it"
    else:
        why = f"{sidecar_of(path).name} belongs to another text of it (edited, or half a write)"
    raise CacheError(
        f"{path} does not say which model and data it was made from: {why}. Calibrate again, or "
        "name the file in `calibration.cache` to use it all the same"
    )


def _with_sidecar(path: Path, cache: Cache, sidecar: Mapping[str, Any]) -> CalibrationTable:
    weights, reads = sidecar.get("weights", {}), sidecar.get("reads", {})
    factors = sidecar.get("factors", {})
    try:
        return CalibrationTable(
            cache.scales,
            sidecar["methods"],
            sidecar["provenance"],
            weights,
            reads,
            factors,
            sidecar.get("axes", {}),
            sidecar.get("float8", {}),
            sidecar.get("float8_weights", {}),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise CacheError(
            f"{sidecar_of(path)} holds weight scales, reads or factors that are none: {error}; it "
            "was edited. Import the quantized model again"
        ) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CacheError(f"no such calibration cache: {path}") from None
    except OSError as error:
        raise CacheError(f"cannot read the calibration cache {path}: {error.strerror}") from error


def _parse_bytes(path: Path, data: bytes) -> Cache:
    try:
        provided = read_provider_table(data)
        return parse_cache(data.decode("utf-8")) if provided is None else _of_provider(provided)
    except UnicodeDecodeError as error:
        raise CacheError(
            f"{path} is not a TensorRT calibration cache: byte {error.start} is not UTF-8 text"
        ) from error
    except CacheError as error:
        raise CacheError(f"{path}: {error}") from error


def _read_sidecar(path: Path) -> dict[str, Any] | None:
    """The sidecar's value; None if there is none. A broken one is an error: it was ours."""
    sidecar = sidecar_of(path)
    try:
        value = json.loads(sidecar.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CacheError(f"cannot read {sidecar}: {error}; delete it to calibrate again") from error
    shape = {"cache_sha256": str, "methods": dict, "provenance": dict}
    known: dict[str, Any] = value if isinstance(value, dict) else {}
    if not all(isinstance(known.get(key), kind) for key, kind in shape.items()):
        raise CacheError(
            f"{sidecar} lacks one of {', '.join(shape)}; it was not written by trtune. "
            "Delete it to calibrate again"
        )
    return known


def check_table(table: CalibrationTable, tensors: Iterable[str]) -> None:
    """Raise CacheError if some of `tensors`, those that the model needs a scale for, have none.

    The message counts them and names the nearest tensor of the table for the first one.
    """
    needed = list(dict.fromkeys(tensors))
    missing = [tensor for tensor in needed if tensor not in table.scales]
    if not missing:
        return
    near = [(tensor, nearest(tensor, table.scales)) for tensor in missing[:5]]
    tensor, close = next(((t, c) for t, c in near if c), (missing[0], []))
    hint = f"; nearest to {tensor!r} is {close[0]!r}" if close else f", such as {tensor!r}"
    raise CacheError(
        f"the calibration cache belongs to another model: {len(missing)} of {len(needed)} tensors "
        f"have no scale in it{hint}. Calibrate again, or give the cache of this model"
    )


def _quoted(line: str) -> str:
    return repr(line if len(line) <= 120 else line[:117] + "...")
