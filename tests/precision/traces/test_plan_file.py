from __future__ import annotations

from pathlib import Path

import pytest
import realdata

from trtune.configs.errors import ModelError
from trtune.precision.traces.plan_file import is_plan, read_header, read_plan

FTRT = bytes.fromhex("66747274" + "00" * 20 + "0a03001e")


def test_what_a_plan_says_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "engine.plan"
    kernel = b"sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize32x64x64_stage6_tensor16x8x32"
    path.write_bytes(FTRT + b"\0" * 5000000 + kernel + b"\0NVIDIA L4\0sm_89\0")
    found = read_plan(path)
    assert (found.maker, found.version, found.serialization) == ("TensorRT", "10.3.0.30", 0)
    assert found.size_bytes == path.stat().st_size
    assert found.int8_kernels == (kernel.decode(),)
    assert "8.9" in found.architectures
    assert found.devices == ("NVIDIA L4",)
    assert "10.3.0.30" in found.lines()[0]


def test_rtx_and_old_plans(tmp_path: Path) -> None:
    assert read_header(b"vtrt" + b"\0" * 20 + bytes([1, 7, 1, 116])) == (
        "vtrt", "TensorRT-RTX", "1.7.1.116", 0,
    )  # fmt: skip
    assert read_header(b"ptrt" + bytes([205]) + b"\0" * 30) == ("ptrt", "TensorRT", "", 205)


@pytest.mark.parametrize("data", [b"", b"plan", b"ftrt", b"\x08\x07\x12" * 20])
def test_other_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.plan").write_bytes(data)
    with pytest.raises(ModelError, match="plan of TensorRT"):
        read_plan(tmp_path / "x.plan")


def test_no_file(tmp_path: Path) -> None:
    assert not is_plan(tmp_path / "x.plan")
    with pytest.raises(ModelError):
        read_plan(tmp_path / "x.plan")


@realdata.needs_data
def test_headers_of_real_plans() -> None:
    lines = realdata.trace("plans", "headers.txt").read_text().splitlines()
    found = [read_header(bytes.fromhex(line.split()[0])) for line in lines]
    versions = [version for _, _, version, _ in found]
    assert len(found) == 26
    assert versions.count("10.3.0.30") == 22
    assert {"10.5.0.18", "10.10.0.31"} < set(versions)
    assert [f for f in found if f[0] == "ptrt"] == [
        ("ptrt", "TensorRT", "", 0), ("ptrt", "TensorRT", "", 43),
    ]  # fmt: skip
