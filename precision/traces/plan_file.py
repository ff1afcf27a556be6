"""An engine plan read without TensorRT: what its first bytes and the kernels' names in it say.

Plans of TensorRT 10 begin with `ftrt`, TensorRT-RTX's with `vtrt`: bytes 24 to 27 are the version.
Those of 8.x begin with `ptrt`, and what follows is a number of the serialization, no version.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtune.configs.errors import ModelError

MAKERS = {b"ftrt": "TensorRT", b"vtrt": "TensorRT-RTX", b"ptrt": "TensorRT"}
VERSIONED = (b"ftrt", b"vtrt")
HEADER = 28
INT8 = re.compile(rb"[ -~]*(?:imma|i8i8_i|i8f32_i|i8f16_i|int8|i8816|i16832)[ -~]*", re.IGNORECASE)
ARCHITECTURE = re.compile(rb"(?<![A-Za-z0-9])sm_?(\d{2,3})(?![0-9])")
DEVICE = re.compile(rb"(?:NVIDIA |Tesla |GeForce |Quadro |Orin|Xavier)[A-Za-z0-9 \-]{2,40}")
CHUNK, OVERLAP = 1 << 22, 512
FAMILIES = {75: "Turing", 80: "Ampere", 86: "Ampere", 87: "Orin", 89: "Ada", 90: "Hopper",
            100: "Blackwell", 120: "Blackwell", 121: "Blackwell"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlanFile:
    """What a plan says of itself.

    `version` is empty where the header has none, `serialization` the number behind the magic,
    `int8_kernels` up to ten names with INT8 arithmetic in them, `architectures` the compute
    capabilities that kernels are named after (a kernel for 8.0 also runs on later GPUs), `devices`
    names of GPUs that stand in it as text.
    """

    path: str
    magic: str
    maker: str
    version: str
    serialization: int
    size_bytes: int
    int8_kernels: tuple[str, ...]
    architectures: tuple[str, ...]
    devices: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def lines(self) -> list[str]:
        """The same in sentences."""
        version = f" {self.version}" if self.version else ", of a version that its header omits"
        gpu = ", ".join(self.devices) or "not told in the file"
        known = ", ".join(self.architectures)
        kernels = f"kernels for compute capability {known}" if known else "no kernel is named"
        int8 = f"yes, such as {self.int8_kernels[0]}" if self.int8_kernels else "no name of one"
        return [
            f"a plan of {self.maker}{version} ({self.magic}, serialization {self.serialization}), "
            f"{self.size_bytes} bytes",
            f"GPU: {gpu}; {kernels}",
            f"INT8 kernels: {int8}",
        ]


def is_plan(path: Path) -> bool:
    """Whether the file begins as a plan of TensorRT or TensorRT-RTX does."""
    try:
        with path.open("rb") as file:
            return file.read(4) in MAKERS
    except OSError:
        return False


def read_header(data: bytes) -> tuple[str, str, str, int]:
    """Magic, maker, version ("10.3.0.30", or empty) and serialization number of a plan's start.

    >>> read_header(bytes.fromhex("66747274" + "00" * 20 + "0a03001e"))
    ('ftrt', 'TensorRT', '10.3.0.30', 0)

    Raises ValueError if `data` is no plan, or shorter than a header.
    """
    magic = data[:4]
    if magic not in MAKERS:
        raise ValueError("no plan of TensorRT: its first bytes are not ftrt, vtrt or ptrt")
    if len(data) < HEADER:
        raise ValueError(
            f"a plan of TensorRT cut off after {len(data)} of its header's {HEADER} bytes"
        )
    version = ".".join(map(str, data[24:28])) if magic in VERSIONED else ""
    (serialization,) = struct.unpack("<I", data[4:8])
    return magic.decode(), MAKERS[magic], version, serialization


def read_plan(path: Path) -> PlanFile:
    """What the plan at `path` says without TensorRT. Raises ModelError if it is none."""
    try:
        with path.open("rb") as file:
            magic, maker, version, serialization = read_header(file.read(HEADER))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is {error}") from error
    kernels: dict[str, None] = {}
    sms: set[int] = set()
    devices: dict[str, None] = {}
    for chunk in _chunks(path):
        for found in INT8.findall(chunk):
            if len(kernels) < 10 and len(found) < 300:
                kernels.setdefault(found.decode("ascii", "replace").strip())
        sms.update(int(number) for number in ARCHITECTURE.findall(chunk) if int(number) in FAMILIES)
        devices.update((d.decode().strip(), None) for d in DEVICE.findall(chunk))
    return PlanFile(
        path=str(path),
        magic=magic,
        maker=maker,
        version=version,
        serialization=serialization,
        size_bytes=path.stat().st_size,
        int8_kernels=tuple(kernels),
        architectures=tuple(f"{sm // 10}.{sm % 10}" for sm in sorted(sms)),
        devices=tuple(devices)[:5],
    )


def _chunks(path: Path) -> Iterator[bytes]:
    """The file in overlapping parts, so that no name is cut at a border."""
    with path.open("rb") as file:
        kept = b""
        while part := file.read(CHUNK):
            yield kept + part
            kept = part[-OVERLAP:]
