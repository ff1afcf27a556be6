from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import realdata
from hypothesis import given
from hypothesis import strategies as st

from trtune.calibrate.cache import (
    Cache,
    check_table,
    convert,
    diff,
    dump_cache,
    header_for,
    load_table,
    parse_cache,
    parse_header,
    read_cache,
    save_table,
    sidecar_of,
)
from trtune.calibrate.table import CalibrationTable
from trtune.configs.errors import CacheError

HEAD = "TRT-101401-EntropyCalibration2"


@pytest.mark.parametrize(
    ("header", "version", "algorithm"),
    [
        ("TRT-8601-EntropyCalibration2", (8, 6, 1), "EntropyCalibration2"),
        ("TRT-7203-MinMaxCalibration", (7, 2, 3), "MinMaxCalibration"),
        ("TRT-9300-LegacyCalibration", (9, 3, 0), "LegacyCalibration"),
        ("TRT-100000-EntropyCalibration2", (10, 0, 0), "EntropyCalibration2"),
        ("TRT-101401-EntropyCalibration2", (10, 14, 1), "EntropyCalibration2"),
        ("TRT-101600-EntropyCalibration", (10, 16, 0), "EntropyCalibration"),
    ],
)
def test_headers_name_version_and_algorithm(
    header: str, version: tuple[int, int, int], algorithm: str
) -> None:
    assert parse_header(header) == (version, algorithm)
    assert header_for(version, algorithm) == header
    assert (Cache(header).version, Cache(header).algorithm) == (version, algorithm)


@pytest.mark.parametrize("version", [(8, 10, 0), (10, 100, 0), (10, 1, 100), (0, 1, 1), (8, -1, 0)])
def test_a_version_that_the_number_cannot_hold(version: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no TensorRT header"):
        header_for(version)


@pytest.mark.parametrize(
    ("line", "name", "scale"),
    [
        pytest.param("x: 3f800000", "x", 1.0, id="one"),
        pytest.param("x: 0", "x", 0.0, id="zero is a single digit"),
        pytest.param("x: 1", "x", 2.0**-149, id="the smallest subnormal"),
        pytest.param("x: 7f7fffff", "x", float(np.finfo(np.float32).max), id="the largest"),
        pytest.param("x: 3C010A14", "x", 0.00787593796849250793, id="upper case is read"),
        pytest.param("a: b: 3f000000", "a: b", 0.5, id="a name with ': '"),
        pytest.param("(Unnamed Layer* 3) [Shuffle]_output: 3f000000", None, 0.5, id="TensorRT's"),
        pytest.param("ünïcode: 3f000000", "ünïcode", 0.5, id="not ASCII"),
        pytest.param(" : 3f000000", " ", 0.5, id="a blank as name"),
    ],
)
def test_lines(line: str, name: str | None, scale: float) -> None:
    name = name if name is not None else line.rpartition(": ")[0]
    assert dict(parse_cache(f"{HEAD}\n{line}\n").scales) == {name: scale}


def test_windows_line_ends_blank_lines_and_byte_order_mark() -> None:
    text = f"\ufeff{HEAD}\r\na: 3f800000\r\nb: 0\r\n\r\n  \n\n"
    assert parse_cache(text) == Cache(HEAD, {"a": 1.0, "b": 0.0})


def test_the_text_is_what_tensorrt_writes() -> None:
    cache = Cache(HEAD, {"input": 0.0078125, "out: 0": 0.0, "tiny": 2.0**-149})
    assert dump_cache(cache) == f"{HEAD}\ninput: 3c000000\nout: 0: 0\ntiny: 1\n"


def test_a_header_alone_is_a_cache_without_scales() -> None:
    assert parse_cache(f"{HEAD}\n") == Cache(HEAD, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "empty: not even a header", id="empty"),
        pytest.param("\n\n", "empty: not even a header", id="blank"),
        pytest.param("hello\n", r"line 1: expected a header .* found 'hello'", id="no header"),
        pytest.param("TRT-x-Foo\n", r"line 1: .* found 'TRT-x-Foo'", id="header without version"),
        pytest.param(f"{HEAD}\nx 3f80", r"line 2: .* found 'x 3f80'", id="no separator"),
        pytest.param(f"{HEAD}\na: 0\nx: 3g", r"line 3: .* found 'x: 3g'", id="no hex"),
        pytest.param(f"{HEAD}\nx: 123456789", r"line 2: .*found 'x: 123456789'", id="9 digits"),
        pytest.param(f"{HEAD}\nx: ", r"line 2: .* found 'x: '", id="no digits"),
        pytest.param(f"{HEAD}\n: 0", r"line 2: .* found ': 0'", id="no name"),
        pytest.param(f"{HEAD}\n\nx: 0", r"line 2: .* found ''", id="a blank line within"),
        pytest.param(f"{HEAD}\na: 0\nb: 0\na: 1", r"line 4: 'a' already .* line 2", id="twice"),
        pytest.param("1\ndata: 3c000889\n", r"header of a cache of TensorRT before 5", id="old"),
        pytest.param("x: 40000000\n", r"line 1: expected a header", id="no header, digits only"),
        pytest.param(f"{HEAD}\nx: bf800000", r"line 2: the scale of 'x' is -1.0", id="negative"),
        pytest.param(f"{HEAD}\nx: 80000000", r"line 2: the scale of 'x' is -0.0", id="minus zero"),
        pytest.param(f"{HEAD}\n{'x' * 500}", r"found 'x{117}\.\.\.'", id="a long line is cut"),
    ],
)
def test_malformed(text: str, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        parse_cache(text)


@pytest.mark.parametrize("word", ["7f800000", "ff800000", "7fc00000", "7FC00001"])
def test_infinity_and_nan_are_no_range_and_written_as_they_were_read(word: str) -> None:
    text = f"{HEAD}\na: 3f800000\nmask: {word}\nb: 3C010A14\n"
    cache = parse_cache(text)
    assert (dict(cache.scales).keys(), cache.no_range) == ({"a", "b"}, ("mask",))
    assert dump_cache(cache) == text
    moved = convert(cache, (10, 14, 1))
    assert dump_cache(moved) == text.replace(HEAD, "TRT-101401-EntropyCalibration2")
    (row,) = diff(cache, Cache(HEAD, {"a": 1.0, "mask": 2.0, "b": cache.scales["b"]}))
    assert (row.tensor, row.a, row.b, row.ratio) == ("mask", math.inf, 2.0, None)


@pytest.mark.parametrize("end", ["\r\n", "", "\r\n\r\n"])
def test_line_ends_of_windows_are_kept(end: str) -> None:
    text = f"{HEAD}\r\na: 3f800000\r\nb: 7f800000{end}"
    assert dump_cache(parse_cache(text)) == text


def test_a_cache_that_was_changed_is_written_with_its_new_scales() -> None:
    read = parse_cache(f"{HEAD}\na: 3F800000\nb: 3F800000\n")
    changed = replace(read, scales={"a": 1.0, "c": 0.5})
    assert dump_cache(changed) == f"{HEAD}\na: 3F800000\nc: 3f000000\n"


def provider_files(folder: Path) -> dict[str, float]:
    """What onnxruntime itself writes into `folder`; the largest magnitudes in it."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    ranges = {"conv out": (-2.0, 2.5), "relu": (0.0, 1.27)}
    data = {
        name: calibrate.TensorData(lowest=np.array(low, "f4"), highest=np.array(high, "f4"))
        for name, (low, high) in ranges.items()
    }
    quantization.write_calibration_table(data, str(folder))
    return {"conv out": 2.5, "relu": 1.27}


@pytest.mark.parametrize("name", ["cache", "json", "flatbuffers"])
def test_the_tables_of_onnxruntime_are_read(tmp_path: Path, name: str) -> None:
    expected = provider_files(tmp_path)
    cache = read_cache(tmp_path / f"calibration.{name}")
    assert "execution provider" in cache.origin
    assert dict(cache.scales) == pytest.approx({t: a / 127 for t, a in expected.items()}, rel=1e-6)
    assert dump_cache(convert(cache, (10, 14, 1))).startswith("TRT-101401-EntropyCalibration2\n")


FIGURES = {
    "c.cache": ("TRT-8600-EntropyCalibration2", 5, 0),
    "diffusion_8600_inf.cache": ("TRT-8601-EntropyCalibration2", 3656, 0),
    "inf.cache": ("TRT-8600-EntropyCalibration2", 5, 1),
    "mlperf05_gnmt_minmax_inf.cache": ("TRT-6001-MinMaxCalibration", 50, 3),
    "mlperf05_resnet.cache": ("TRT-6001-EntropyCalibration2", 125, 0),
    "mlperf07_dlrm.cache": ("TRT-7200-EntropyCalibration2", 21, 0),
    "mlperf07_rnnt_minmax.cache": ("TRT-7200-MinMaxCalibration", 22, 0),
    "mlperf10_resnet50.cache": ("TRT-7203-EntropyCalibration2", 125, 0),
    "mlperf20_3dunet_minmax.cache": ("TRT-8201-MinMaxCalibration", 57, 0),
    "mlperf21_retinanet.cache": ("TRT-8402-EntropyCalibration2", 448, 0),
    "tao_detectnet_v2.bin": ("TRT-7000-EntropyCalibration2", 131, 0),
    "tao_frcnn.bin": ("TRT-7000-EntropyCalibration2", 69, 0),
    "tao_retinanet.bin": ("TRT-7000-EntropyCalibration2", 245, 0),
    "tao_yolov3.bin": ("TRT-7000-EntropyCalibration2", 262, 0),
    "yolo_deepstream_8502.table": ("TRT-8502-EntropyCalibration2", 459, 0),
    "yolov5s_qat2ptq_8600.cache": ("TRT-8600-EntropyCalibration2", 197, 0),
    "yolov8n_101401.bin": ("TRT-101401-EntropyCalibration2", 249, 0),
}
"""Real caches: header, scales, tensors without a range."""


@realdata.needs_data
@pytest.mark.parametrize("name", FIGURES)
def test_real_caches_are_read_and_written_byte_for_byte(name: str) -> None:
    path = realdata.trace("caches", name)
    cache = read_cache(path)
    assert (cache.header, len(cache.scales), len(cache.no_range)) == FIGURES[name]
    assert dump_cache(cache).encode() == path.read_bytes()
    assert (
        dump_cache(convert(cache, (10, 14, 1))).encode().split(b"\n")[1:]
        == (path.read_bytes().split(b"\n")[1:])
    )


names = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1)
scales = st.integers(0, 0x7F7FFFFF).map(lambda w: struct.unpack(">f", struct.pack(">I", w))[0])


@given(st.dictionaries(names, scales))
def test_any_table_survives_the_text(entries: dict[str, float]) -> None:
    text = dump_cache(Cache(HEAD, entries))
    found = parse_cache(text.encode().decode())
    assert found.header == HEAD
    assert list(found.scales.items()) == list(entries.items())
    assert dump_cache(found) == text


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        ("a\nb", 1.0, "the tensor name"),
        ("", 1.0, "the tensor name"),
        ("x", math.inf, "the scale inf"),
        ("x", -1.0, "the scale -1.0"),
    ],
)
def test_what_the_format_cannot_hold_is_a_bug(name: str, scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dump_cache(Cache(HEAD, {name: scale}))


def test_minus_zero_is_written_as_zero() -> None:
    assert dump_cache(Cache(HEAD, {"x": -0.0})).endswith("x: 0\n")


def test_convert_changes_the_header_alone() -> None:
    old = Cache("TRT-8601-MinMaxCalibration", {"x": 0.5})
    assert convert(old, (10, 14, 1)) == Cache("TRT-101401-MinMaxCalibration", {"x": 0.5})


@pytest.mark.parametrize("algorithm", ["EntropyCalibration", "LegacyCalibration"])
def test_caches_made_after_fusion_are_not_converted(algorithm: str) -> None:
    with pytest.raises(CacheError, match=f"{algorithm} was made after TensorRT fused"):
        convert(Cache(f"TRT-8601-{algorithm}", {"x": 0.5}), (10, 14, 1))


def test_diff_lists_missing_tensors_then_the_largest_ratios() -> None:
    a = Cache(HEAD, {"same": 1.0, "only a": 1.0, "half": 1.0, "five": 1.0, "was zero": 0.0})
    b = Cache(HEAD, {"same": 1.0, "half": 0.5, "five": 5.0, "was zero": 1.0, "only b": 2.0})
    assert [(row.tensor, row.a, row.b, row.ratio) for row in diff(a, b)] == [
        ("only a", 1.0, None, None),
        ("only b", None, 2.0, None),
        ("was zero", 0.0, 1.0, math.inf),
        ("five", 1.0, 5.0, 5.0),
        ("half", 1.0, 0.5, 0.5),
    ]
    assert [row.ratio for row in diff(Cache(HEAD, {"x": 1.0}), Cache(HEAD, {"x": 0.0}))] == [0.0]
    assert diff(a, a) == []


TABLE = CalibrationTable(
    {"input": 0.02, "gone: 0": 0.0}, {"input": "entropy"}, {"model": "abc", "pictures": 256}
)


def test_a_table_survives_the_files(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    save_table(path, TABLE, HEAD)
    assert load_table(path) == TABLE
    assert read_cache(path) == Cache(HEAD, TABLE.scales)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, sidecar_of(path).name]
    sidecar = json.loads(sidecar_of(path).read_text())
    assert sidecar["provenance"] == {"model": "abc", "pictures": 256}
    assert len(sidecar["key"]) == 64


def test_the_key_is_that_of_the_provenance(tmp_path: Path) -> None:
    keys = []
    for number, table in enumerate([TABLE, TABLE, CalibrationTable({"x": 1.0})]):
        save_table(tmp_path / str(number), table)
        keys.append(json.loads(sidecar_of(tmp_path / str(number)).read_text())["key"])
    assert keys[0] == keys[1] != keys[2]


def test_a_cache_without_its_key_is_used_only_by_name(tmp_path: Path) -> None:
    path = tmp_path / "theirs.cache"
    path.write_bytes(b"TRT-8601-EntropyCalibration2\nx: 3f000000\n")
    with pytest.raises(CacheError, match=r"no theirs.cache.json beside it.*`calibration.cache`"):
        load_table(path)
    table = load_table(path, allow_unkeyed=True)
    assert dict(table.scales) == {"x": 0.5}
    assert dict(table.provenance) == {"source": "unkeyed"}


@pytest.mark.parametrize("half", ["edited", "old cache, new sidecar"])
def test_a_cache_that_does_not_match_its_sidecar_is_refused(tmp_path: Path, half: str) -> None:
    path = tmp_path / "calibration.cache"
    save_table(path, TABLE, HEAD)
    if half == "edited":
        path.write_text(path.read_text() + "more: 0\n")
    else:
        stale = path.read_bytes()
        save_table(path, CalibrationTable({"input": 0.5}, provenance={"model": "new"}), HEAD)
        path.write_bytes(stale)
    with pytest.raises(CacheError, match="belongs to another text"):
        load_table(path)
    assert load_table(path, allow_unkeyed=True).provenance == {"source": "unkeyed"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot read"), ("[]", "lacks one of"), ('{"cache_sha256": 1}', "lacks one of")],
)
def test_a_broken_sidecar(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "calibration.cache"
    save_table(path, TABLE, HEAD)
    sidecar_of(path).write_text(text)
    with pytest.raises(CacheError, match=message):
        load_table(path)


def test_a_cache_with_no_scale_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_text(f"{HEAD}\n")
    with pytest.raises(CacheError, match="a header and no scale"):
        load_table(path, allow_unkeyed=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"\xff\xfe\x00", "byte 0 is not UTF-8", id="binary"),
        pytest.param(b"TRT-8601-X\nx\n", r"c: line 2: expected", id="malformed"),
        pytest.param(None, "no such calibration cache", id="absent"),
    ],
)
def test_errors_name_the_file(tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "c"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CacheError, match=message) as caught:
        read_cache(path)
    assert str(path) in str(caught.value)


def test_a_folder_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="cannot read the calibration cache"):
        read_cache(tmp_path)


def test_nothing_is_left_when_the_header_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="line 1"):
        save_table(tmp_path / "c", TABLE, "made up")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_another_model_counts_the_tensors_missing() -> None:
    table = CalibrationTable({"input": 1.0, "conv1_out": 1.0})
    check_table(table, ["input", "conv1_out", "input"])
    expected = r"1 of 3 tensors have no scale in it; nearest to 'conv_1_out' is 'conv1_out'"
    with pytest.raises(CacheError, match=expected):
        check_table(table, ["input", "conv1_out", "conv_1_out"])
    with pytest.raises(CacheError, match=r"2 of 2 tensors .*, such as 'zzz'"):
        check_table(table, ["zzz", "yyy"])


def test_what_came_with_a_quantized_model_stands_in_the_sidecar(tmp_path: Path) -> None:
    table = CalibrationTable(
        {"x": 0.5}, {"x": "qat"}, {"model": "m"}, {"w": (0.1, 0.25)}, {"x": (("conv", 0),)}
    )
    save_table(tmp_path / "c", table)
    assert load_table(tmp_path / "c") == table
    assert dump_cache(read_cache(tmp_path / "c")) == f"{HEAD}\nx: 3f000000\n"


def test_a_sidecar_with_impossible_weight_scales_is_refused(tmp_path: Path) -> None:
    save_table(tmp_path / "c", CalibrationTable({"x": 0.5}, weights={"w": (0.1,)}))
    sidecar = sidecar_of(tmp_path / "c")
    value = json.loads(sidecar.read_text("utf-8"))
    for broken in ({"w": [0]}, {"w": 3}, [1]):
        sidecar.write_text(json.dumps({**value, "weights": broken}), "utf-8")
        with pytest.raises(CacheError, match="holds weight scales, reads or factors that are none"):
            load_table(tmp_path / "c")


def test_factors_are_kept_beside_the_cache(tmp_path: Path) -> None:
    table = CalibrationTable({"x": 0.5}, {"x": "mse"}, factors={"x": 1.25})
    save_table(tmp_path / "c", table)
    assert load_table(tmp_path / "c") == table
