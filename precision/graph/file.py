"""The ONNX file: read with errors a user can act on, normalised once, written whole or not."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Literal

import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper, numpy_helper

from trtune.configs.errors import ModelError
from trtune.configs.files import atomic_path, hash_bytes, hash_file
from trtune.datasets.batches import InputSpec
from trtune.precision.graph.branches import InputValue, fix_inputs, settle_branches
from trtune.precision.graph.cut import Tail, cut_plugins, end_at, ending_at
from trtune.precision.graph.fold import Folded, Folding
from trtune.precision.graph.fold import fold as fold_model
from trtune.precision.graph.normalise import free_dimensions, normalise
from trtune.precision.graph.opsets import BROADCAST_OPSET
from trtune.precision.graph.proto import (
    HEAVY_BYTES,
    copy_fields,
    default_opset,
    external_tensors,
    is_external,
    tensor_bytes,
)
from trtune.precision.graph.widen import computing_in_half, widen_halves

log = logging.getLogger(__name__)

LOAD_LIMIT = 3 << 29
"""Weights up to 1.5 GiB are read into the protobuf, which can hold 2 GiB with all that is added."""
SAVE_LIMIT = (1 << 31) - (1 << 24)
"""Weights above this are written to a file of their own: a protobuf ends at 2 GiB."""
PAGE = 4096

SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (
        0,
        b"version https://git-lfs",
        "a Git LFS pointer: fetch the model with `git lfs pull`",
    ),
    (
        0,
        b"PK\x03\x04",
        "a zip archive such as PyTorch's .pt: export it with torch.onnx.export",
    ),
    (0, b"\x80\x02", "a Python pickle: export the model with torch.onnx.export"),
    (0, b"\x89HDF", "an HDF5 file, as Keras writes: convert it with tf2onnx"),
    (4, b"TFL3", "a TensorFlow Lite model: convert it with tf2onnx"),
    (0, b"ftrt", "a TensorRT engine: give the ONNX file that it was built from"),
    (0, b"ptrt", "a TensorRT engine: give the ONNX file that it was built from"),
    (0, b"ORTM", "an onnxruntime .ort file: give the ONNX file that it was made from"),
    (4, b"ORTM", "an onnxruntime .ort file: give the ONNX file that it was made from"),
    (0, b"\x1f\x8b", "a gzip file: unpack it"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"<", "a web page or XML file; perhaps the download went wrong"),
)


@dataclass(frozen=True, slots=True)
class Model:
    """A normalised ONNX model and where it came from.

    `proto` is never modified: who wants to change it copies it. `sha256` is that of the file's
    bytes, external data included. `inputs` leaves out initializers. `notes` says what normalising
    changed. `external_dir` is the folder of the weights if they were too large to be read in.
    `folded` are the nodes of the file whose work others do, or nobody has to do. `tail` is what
    stands behind the operators that onnxruntime lacks, which `proto` ends before. `counted` are the
    outputs that are judged, where not all are. `fixed` are inputs of the file that the user gave a
    value: constants of `proto`, as far as it still reads them. `half` is the half type that the
    file computes in where `proto` computes in float32 instead ("float16"; else "").
    """

    proto: onnx.ModelProto
    path: Path
    sha256: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]
    opset: int
    notes: tuple[str, ...] = ()
    external_dir: Path | None = None
    folded: Mapping[str, Folded] = field(default_factory=lambda: MappingProxyType({}))
    tail: Tail | None = None
    counted: tuple[str, ...] = ()
    fixed: tuple[onnx.TensorProto, ...] = ()
    half: str = ""

    @property
    def judged(self) -> tuple[str, ...]:
        """The outputs that are judged, in the model's order."""
        names = (spec.name for spec in self.outputs)
        return tuple(name for name in names if not self.counted or name in self.counted)


Fold = Literal["all", "constants", "none"]


def load_model(
    path: Path,
    *,
    load_limit: int = LOAD_LIMIT,
    fold: Fold = "all",
    outputs: Sequence[str] = (),
    constants: Mapping[str, InputValue] = MappingProxyType({}),
    widen: bool = False,
) -> Model:
    """Read, check, normalise, cut and fold the ONNX file at `path`.

    `outputs` names the tensors that the model ends at; what lies behind is left out. Without it,
    it ends at the file's outputs, or before what onnxruntime lacks (`Model.tail`). `constants`
    are values for some inputs, which it then does not have.

    `fold` "constants" leaves batch normalization as it is, "none" all nodes. With `widen` a file
    that computes in float16 or bfloat16 is raised to float32 (`Model.half`).

    Weights in external files are read in if together they have at most `load_limit` bytes;
    otherwise only the small ones (shapes, scalars) are, and `Model.external_dir` is set.

    Raises ModelError, naming the file and what was found in it.
    """
    path = Path(path)
    proto = _read(path)
    try:
        digest, external_dir = _read_external(proto, path, load_limit)
        model = model_from_proto(
            proto,
            path,
            sha256=digest,
            external_dir=external_dir,
            fold=fold,
            outputs=outputs,
            constants=constants,
            widen=widen,
        )
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    for note in model.notes:
        log.info("%s: %s", path.name, note)
    return model


def _read_external(proto: onnx.ModelProto, path: Path, load_limit: int) -> tuple[str, Path | None]:
    """Read external weights into `proto`; the hash, and the folder of those that stay outside."""
    external = list(external_tensors(proto.graph))
    digest = _hash_with_external(path, external)
    large = sum(tensor_bytes(tensor) for tensor in external) > load_limit
    try:
        for tensor in external:
            _state_length(tensor)
            if not large or tensor_bytes(tensor) <= HEAVY_BYTES:
                external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
                tensor.ClearField("data_location")
                tensor.ClearField("external_data")
    except (OSError, onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(f"its external weights cannot be read: {error}") from error
    return digest, path.parent.resolve() if large else None


def model_from_proto(
    proto: onnx.ModelProto,
    path: Path = Path("model.onnx"),
    *,
    sha256: str | None = None,
    external_dir: Path | None = None,
    fold: Fold = "all",
    outputs: Sequence[str] = (),
    constants: Mapping[str, InputValue] = MappingProxyType({}),
    widen: bool = False,
) -> Model:
    """The normal form of a model that is already in memory, folded; `proto` is not touched.

    `sha256` is by default that of the serialised proto. Raises ModelError as `load_model` does.
    """
    try:
        normal, notes = normalise(proto)
        _ = normal.producer_name, normal.producer_version  # read only where they are shown
    except UnicodeDecodeError as error:
        raise ModelError(f"the model is not valid ONNX: a name is not UTF-8: {error}") from error
    digest = sha256 or hash_bytes(proto.SerializeToString(deterministic=True))
    if outputs:
        end_at(normal, outputs)
        digest = hash_bytes(f"{digest} {list(outputs)}".encode())
    fixed = fix_inputs(normal, constants)
    if fixed:
        values = [tensor.SerializeToString(deterministic=True).hex() for tensor in fixed]
        digest = hash_bytes(f"{digest} {values}".encode())
        notes = (*notes, f"inputs that are constants: {_said(constants)}")
    if fold != "none":
        notes = (*notes, *settle_branches(normal, external_dir))
    tail = cut_plugins(normal, strict=fold != "none")
    half, first = "", Folding()
    if widen:
        half, first = _widened(normal, external_dir, fold=fold != "none")
        digest = hash_bytes(f"{digest} in float32".encode()) if half else digest
    folding = Folding()
    if fold != "none":
        folding = fold_model(normal, external_dir, batch_norm=fold == "all")
    opset = default_opset(normal)
    assert opset is not None
    return Model(
        proto=normal,
        path=Path(path),
        sha256=digest,
        inputs=tuple(_spec("input", info) for info in normal.graph.input),
        outputs=tuple(_spec("output", info) for info in normal.graph.output),
        opset=opset,
        notes=(*notes, *([tail.note] if tail else []), *first.notes, *folding.notes),
        external_dir=external_dir,
        folded=MappingProxyType({**first.gone, **folding.gone}),
        tail=tail,
        fixed=fixed,
        half=half,
    )


def _widened(
    model: onnx.ModelProto, external_dir: Path | None, *, fold: bool
) -> tuple[str, Folding]:
    """`widen_halves` of `model`, whose constants are computed first as the file has them."""
    if not computing_in_half(model.graph):
        return "", Folding()
    first = fold_model(model, external_dir, batch_norm=False) if fold else Folding()
    before = {node.name: node.op_type for node in model.graph.node}
    half, said = widen_halves(model, external_dir)
    left = {node.name for node in model.graph.node}
    gone = {name: Folded(op) for name, op in before.items() if name not in left}
    notes = (*first.notes, *([said] if said else []))
    return half, Folding(notes, MappingProxyType({**first.gone, **gone}))


def _said(constants: Mapping[str, InputValue]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in constants.items())


def comparable(model: Model) -> Path | onnx.ModelProto | None:
    """The user's own file, as far as onnxruntime runs it: what `model` must give the values of.

    The file itself, a copy of it that ends where `model` ends, or None for an opset so old that
    onnxruntime has no operators of it. Raises ModelError as `load_model` does.
    """
    raw = _read(model.path)
    opset = default_opset(raw)
    if opset is not None and opset < BROADCAST_OPSET:
        return None
    names = [spec.name for spec in model.outputs]
    whole = names == [info.name for info in raw.graph.output]
    if model.fixed:
        raw.graph.initializer.extend(model.fixed)
        return raw if whole else ending_at(raw, names)
    if free_dimensions(raw) is not None and whole:
        return raw  # onnxruntime takes a 0 at its word
    if whole:
        return model.path
    return ending_at(raw, names)


def _read(path: Path) -> onnx.ModelProto:
    if path.is_dir():
        raise ModelError(f"{path} is a folder; `model.path` must name an ONNX file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*.onnx")) if path.parent.is_dir() else []
        found = f"; in that folder: {', '.join(beside[:5])}" if beside else ""
        raise ModelError(f"no such model: {path}{found}") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    if not data:
        raise ModelError(f"{path} is empty (0 bytes); export or download it again")
    for offset, magic, meaning in SIGNATURES:
        if data[offset:].startswith(magic):
            raise ModelError(f"{path} is not an ONNX file but {meaning}")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        if data[:1] == b"\x08" and 0 < data[1] < 64:
            raise ModelError(
                f"{path} begins as an ONNX file but is truncated or damaged ({len(data)} bytes); "
                "export or copy it again"
            ) from error
        raise ModelError(_not_onnx(path, data)) from error
    if not proto.ir_version or not proto.HasField("graph"):
        raise ModelError(_not_onnx(path, data))
    if not proto.graph.node:
        raise ModelError(f"{path} is an ONNX file with an empty graph: there is nothing to run")
    return proto


def _not_onnx(path: Path, data: bytes) -> str:
    return f"{path} is not an ONNX file: {len(data)} bytes that begin with {data[:16]!r}"


def _state_length(tensor: onnx.TensorProto) -> None:
    """Add the optional `length`: without it onnx would read on to the end of the file."""
    if not any(entry.key == "length" for entry in tensor.external_data):
        tensor.external_data.add(key="length", value=str(tensor_bytes(tensor)))


def _place(tensor: onnx.TensorProto) -> external_data_helper.ExternalDataInfo:
    """Where the values of `tensor` lie; ModelError if that is no place in a file."""
    for entry in tensor.external_data:  # onnx looks from 1.20 on
        if entry.key in ("offset", "length") and not re.fullmatch("[0-9]+", entry.value):
            raise ModelError(
                f"the place of its external weight {tensor.name!r}: {entry.key} {entry.value!r} "
                "is no number of bytes"
            )
    return external_data_helper.ExternalDataInfo(tensor)


def _hash_with_external(path: Path, external: list[onnx.TensorProto]) -> str:
    """SHA-256 of the file; with external data, of the hashes of all the files by name."""
    places = set()
    for tensor in external:
        info = _place(tensor)
        place = info.location
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise ModelError(f"its weights are in {place!r}, outside the model's folder")
        if not (path.parent / place).is_file():
            raise ModelError(
                f"its weights are in {place!r}, which is not in {path.parent}; "
                "copy that file beside the model"
            )
        needed = (info.offset or 0) + (info.length or tensor_bytes(tensor))
        found = (path.parent / place).stat().st_size
        if found < needed:
            raise ModelError(
                f"its weights in {place!r} are truncated: {found} bytes, but {tensor.name!r} "
                f"ends at byte {needed}; copy or export them again"
            )
        places.add(place)
    if not places:
        return hash_file(path)
    digest = hashlib.sha256(hash_file(path).encode())
    for place in sorted(places):
        digest.update(f"{place}\0{hash_file(path.parent / place)}".encode())
    return digest.hexdigest()


def tensor_spec(info: onnx.ValueInfoProto) -> InputSpec | None:
    """Name, shape and numpy dtype of a tensor; None if it is none, or its rank is unknown."""
    kind = info.type.tensor_type
    if not info.type.HasField("tensor_type") or not kind.HasField("shape") or not kind.elem_type:
        return None
    shape: list[int | str | None] = []
    for dim in kind.shape.dim:
        shape.append(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return InputSpec(info.name, tuple(shape), dtype)


def _spec(role: str, info: onnx.ValueInfoProto) -> InputSpec:
    spec = tensor_spec(info)
    if spec is not None:
        return spec
    kind = info.type.tensor_type
    if role == "output" and info.type.HasField("tensor_type") and kind.elem_type:
        return InputSpec(info.name, (), onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name)
    found = "a tensor of unknown rank" if info.type.HasField("tensor_type") else "not a tensor"
    raise ModelError(
        f"{role} {info.name!r} is {found}; export the model with tensors of known rank "
        "as inputs and outputs"
    )


def save_model(
    proto: onnx.ModelProto,
    path: Path,
    external_dir: Path | None = None,
    *,
    save_limit: int = SAVE_LIMIT,
) -> None:
    """Write `proto` to `path` in one step; `proto` is not touched.

    If the weights exceed `save_limit` bytes, or some are in files under `external_dir`, they go to
    `path` + ".data" beside it (those of at most 4096 bytes stay inside).

    Raises TrtuneError, naming the file, if it cannot be written; nothing half-written stays.
    """
    path = Path(path)
    external = any(True for _ in external_tensors(proto.graph))
    if external and external_dir is None:
        raise ValueError("the model has external tensors: external_dir must say where they are")
    size = sum(tensor_bytes(tensor) for tensor in proto.graph.initializer)
    with atomic_path(path) as target:
        if not external and size <= save_limit:
            target.write_bytes(proto.SerializeToString())
        else:
            _write_external(proto, target, external_dir)


def _write_external(proto: onnx.ModelProto, target: Path, external_dir: Path | None) -> None:
    """Write `target` and `target` + ".data"."""
    light = onnx.ModelProto()
    graph = onnx.GraphProto()
    data_path = target.with_name(target.name + ".data")
    with data_path.open("wb") as data:
        for tensor in proto.graph.initializer:
            if tensor_bytes(tensor) <= HEAVY_BYTES and not tensor.external_data:
                graph.initializer.append(tensor)
                continue
            data.write(b"\0" * (-data.tell() % PAGE))
            offset = data.tell()
            _write_values(tensor, data, external_dir)
            placed = graph.initializer.add(name=tensor.name, data_type=tensor.data_type)
            placed.dims.extend(tensor.dims)
            placed.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (
                ("location", data_path.name),
                ("offset", offset),
                ("length", data.tell() - offset),
            ):
                placed.external_data.add(key=key, value=str(value))
    copy_fields(proto, light, leave_out={"graph"})
    copy_fields(proto.graph, graph, leave_out={"initializer"})
    light.graph.CopyFrom(graph)
    target.write_bytes(light.SerializeToString())


def _write_values(tensor: onnx.TensorProto, data: BinaryIO, external_dir: Path | None) -> None:
    """Append the raw bytes of `tensor`, which may lie in a file of gigabytes."""
    if not is_external(tensor):
        data.write(
            tensor.raw_data or numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
        )
        return
    info = external_data_helper.ExternalDataInfo(tensor)
    assert external_dir is not None
    with (external_dir / info.location).open("rb") as source:
        source.seek(info.offset or 0)
        left = info.length or tensor_bytes(tensor)
        while left:
            block = source.read(min(left, 1 << 24))
            if not block:
                raise ModelError(f"{external_dir / info.location} ends within {tensor.name!r}")
            data.write(block)
            left -= len(block)
