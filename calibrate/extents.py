"""How large tensors are, and along which axis their pictures lie."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.shape_inference
from numpy.typing import NDArray

from trtune.calibrate.sessions import SharedWeights, open_session, with_outputs
from trtune.datasets.batches import Batch, InputSpec, batch_size, fit_batch, take_rows

log = logging.getLogger(__name__)

MOST_OF_A_SHAPE = 1024
"""Elements of a constant that shape inference may need to read."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How large a tensor is: bytes a picture (as float32), and the axis of the pictures, if any."""

    bytes: int
    axis: int | None


def measure(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batch: Batch,
    *,
    external_dir: Path | None = None,
) -> dict[str, Extent]:
    """Size and picture axis of each tensor.

    From the shapes for two pictures and for one: the axis whose length follows the number of
    pictures is theirs. If there is only one picture, or the model takes only one, it is all of
    every tensor: axis 0 with one row. A model of fixed batch size is asked once, and the axis is
    the one that has this length (the first, if it is a multiple). Where ONNX's shape inference
    does not tell all shapes, the network is run for them.

    Raises ModelError if the runtime then cannot load the model.
    """
    inner = [tensor for tensor in tensors if tensor not in batch.feeds]
    fixed = pictures_fixed(model, batch)
    size = fixed or min(len(batch), 2)
    sizes = (size,) if fixed or size == 1 else (size, size - 1)
    feeds = [dict(fit_batch(take_rows(batch, slice(0, n)), n).feeds) for n in sizes]
    found = _inferred(model, inner, feeds) or _seen(model, inner, feeds, external_dir)
    full, less = (
        shapes | {name: array.shape for name, array in fed.items()}
        for shapes, fed in zip((found[0], found[-1]), (feeds[0], feeds[-1]), strict=True)
    )
    axes = {
        t: _fixed_axis(full[t], size) if len(sizes) == 1 else _picture_axis(full[t], less[t], size)
        for t in tensors
    }
    return {t: Extent(4 * math.prod(full[t]) // size, axes[t]) for t in tensors}


_Shapes = dict[str, tuple[int, ...]]
_Feeds = Mapping[str, NDArray[Any]]


def _inferred(
    model: onnx.ModelProto, tensors: Sequence[str], feeds: Sequence[_Feeds]
) -> list[_Shapes]:
    """The shapes of `tensors` for each of `feeds` by ONNX's inference; empty if one is unknown."""
    small = [_light(tensor) for tensor in model.graph.initializer]
    shapes: list[_Shapes] = []
    for fed in feeds:
        probe = onnx.ModelProto(
            ir_version=model.ir_version,
            opset_import=model.opset_import,
            functions=model.functions,
            graph=onnx.GraphProto(
                name=model.graph.name,
                node=model.graph.node,
                initializer=small,
                sparse_initializer=model.graph.sparse_initializer,
                input=[_typed(info, fed.get(info.name)) for info in model.graph.input],
                output=[onnx.ValueInfoProto(name=tensor) for tensor in tensors],
            ),
        )
        try:
            graph = onnx.shape_inference.infer_shapes(probe, data_prop=True).graph
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
            log.debug("shapes are not inferred: %s", error)
            return []
        told = {info.name: _shape(info) for info in graph.output}
        known = {tensor: shape for tensor, shape in told.items() if shape is not None}
        if len(known) < len(tensors):
            return []
        shapes.append(known)
    return shapes


def _light(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """`tensor` without its data if that is too much to be a shape, an axis or a padding."""
    if math.prod(tensor.dims) <= MOST_OF_A_SHAPE:
        return tensor
    return onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)


def _typed(info: onnx.ValueInfoProto, array: NDArray[Any] | None) -> onnx.ValueInfoProto:
    """`info` with the shape of `array`."""
    if array is None or not info.type.HasField("tensor_type"):
        return info
    kind = info.type.tensor_type.elem_type
    return onnx.helper.make_tensor_value_info(info.name, kind, array.shape)


def _shape(info: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    """The shape that `info` tells, or None if it does not tell all of it."""
    kind = info.type.tensor_type
    if not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
        return None
    return tuple(d.dim_value for d in kind.shape.dim)


def _seen(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    feeds: Sequence[_Feeds],
    external_dir: Path | None,
) -> list[_Shapes]:
    """The shapes of `tensors` for each of `feeds`, from inferences that give nothing else back."""
    names = {tensor: f"{tensor}/trtune_shape" for tensor in tensors}
    weights = SharedWeights(model.graph.initializer)
    probe = weights.without(model)
    probe.graph.node.extend(
        onnx.helper.make_node("Shape", [tensor], [name], name=name)
        for tensor, name in names.items()
    )
    session = open_session(
        with_outputs(probe, list(names.values())),
        optimize="none",
        external_dir=external_dir,
        weights=weights.read_by(probe),
    )
    shapes: list[_Shapes] = []
    for fed in feeds:
        found = session.run(list(names.values()), dict(fed)) if names else []
        shapes.append({t: tuple(map(int, s)) for t, s in zip(names, found, strict=True)})
    return shapes


def pictures_fixed(model: onnx.ModelProto, batch: Batch) -> int:
    """The batch size that the model fixes, or 0."""
    specs = []
    for info in model.graph.input:
        if info.name in batch.feeds and info.type.tensor_type.HasField("shape"):
            dims = (d.dim_value or None for d in info.type.tensor_type.shape.dim)
            specs.append(InputSpec(info.name, tuple(dims), ""))
    return batch_size(specs, 0, batch.axes)


def _picture_axis(full: tuple[int, ...], less: tuple[int, ...], size: int) -> int | None:
    """The axis of `full` that holds `size` pictures, given the shape for one picture fewer.

    >>> _picture_axis((3, 8, 65), (3, 7, 65), 8), _picture_axis((16, 5), (14, 5), 8)
    (1, 0)
    """
    for axis, (a, b) in enumerate(zip(full, less, strict=True)):
        if a != b:
            return axis if a * (size - 1) == b * size else None
    return None


def _fixed_axis(shape: tuple[int, ...], size: int) -> int | None:
    """The axis of `shape` that seems to hold `size` pictures.

    >>> _fixed_axis((4, 65), 4), _fixed_axis((65, 4, 9), 4), _fixed_axis((8, 5), 4)
    (0, 1, 0)
    """
    if size == 1 or shape[:1] == (size,):
        return 0
    if shape.count(size) == 1:
        return shape.index(size)
    return 0 if shape and shape[0] % size == 0 else None
