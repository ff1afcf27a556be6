"""The quantization that a model carries: which tensor goes through which scale, and who reads it.

Everything here reads a normalised graph in which integer operators are already written as
QuantizeLinear and DequantizeLinear (`qdq_operators`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trtune.calibrate.float8 import float8_codes
from trtune.precision.graph.proto import attribute
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import Edge, carries, moves_codes
from trtune.precision.plan.plan import COMPUTE_OPS, ELEMENTWISE_OPS

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
ACTIVATION, WEIGHT, BIAS, CONSTANT = "activation", "weight", "bias", "constant"
INT8_RANGE = (-128, 127)
UINT8, FLOAT8 = "uint8", "float8_e4m3fn"


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A QuantizeLinear with a DequantizeLinear behind it, or the latter alone behind stored codes.

    `name` is the DequantizeLinear, `quantize` the QuantizeLinear ("" if the codes are stored).
    `source` is the float tensor, or the codes; `result` what `readers` read. `scale` is None if it
    is computed at run time, `zero_point` None if there is none; `dtype` is that of the codes.
    `constant` says that the source is known without an input of the model.
    """

    name: str
    quantize: str
    source: str
    result: str
    scale: NDArray[Any] | None
    zero_point: NDArray[Any] | None
    dtype: str
    axis: int
    constant: bool
    readers: tuple[Edge, ...]
    is_output: bool = False
    agrees: bool = True
    blocked: bool = False

    @property
    def zero_points(self) -> NDArray[np.int64]:
        """The zero point as int64, 0 where there is none."""
        value = np.zeros((), np.int64) if self.zero_point is None else self.zero_point
        return np.asarray(value, np.int64)

    @property
    def codes(self) -> str:
        """fp8 for float8 codes (E4M3), else int8, which integer codes are made."""
        return "fp8" if self.dtype == FLOAT8 else "int8"

    @property
    def per_channel(self) -> bool:
        """Whether there are several scales."""
        return self.scale is not None and self.scale.size > 1

    @property
    def node(self) -> str:
        """The node that a finding about this pair names."""
        return self.quantize or self.name


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where the weights of a node come from: a pair, and the Transposes behind it, as one order of
    axes (None if there are none)."""

    pair: Pair
    order: tuple[int, ...] | None = None

    @property
    def axis(self) -> int:
        """The axis of the weights, as the node reads them, that the scales belong to."""
        return self.pair.axis if self.order is None else self.order.index(self.pair.axis)


@dataclass(frozen=True, slots=True)
class Found:
    """The quantization of a graph.

    `weights` maps (node, input index) of products to where their weights come from, `roles` each
    pair's name to activation, weight, bias or constant, `int8` the nodes that are quantized on
    data and weights, `products` the matrix products of two quantized tensors of data, and
    `elementwise` the sums and products of elements all of whose inputs are such tensors. `passed`
    are DequantizeLinears behind operators that move codes about; `strays` are QuantizeLinears and
    DequantizeLinears without the other half.
    """

    pairs: tuple[Pair, ...]
    passed: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()
    weights: Mapping[Edge, WeightSource] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    int8: tuple[str, ...] = ()
    products: tuple[str, ...] = ()
    elementwise: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))
        object.__setattr__(self, "roles", MappingProxyType(dict(self.roles)))

    def of_role(self, *roles: str) -> Iterator[Pair]:
        """The pairs with one of `roles`, in graph order."""
        return (pair for pair in self.pairs if self.roles[pair.name] in roles)


def find_quantization(view: GraphView) -> Found:
    """All pairs of a graph, what each is for, and what is left over."""
    pairs: list[Pair] = []
    passed: list[str] = []
    strays: list[str] = []
    for node in view.nodes:
        if node.op_type == DEQUANTIZE:
            source = quantize_before(view, node.input[0])
            direct = source is not None and not source[1]
            if direct or view.is_constant(node.input[0]):
                pairs.append(_pair(view, node, source[0] if source and direct else None))
            elif source:
                passed.append(node.name)
            else:
                strays.append(node.name)
        elif node.op_type == QUANTIZE:
            moved, others = _code_readers(view, node)
            if moved and not view.is_constant(node.input[0]):
                pairs.append(_moving_pair(view, node, moved))
            if (
                others
                or node.output[0] in view.graph_outputs
                or not view.consumers.get(node.output[0])
            ):
                strays.append(node.name)
    weights = _weights(view, pairs)
    roles = {pair.name: _role(view, pair, weights) for pair in pairs}
    carried = {pair.result: pair for pair in pairs if roles[pair.name] == ACTIVATION}
    int8 = tuple(
        node.name
        for node in view.nodes
        if (node.name, 1) in weights
        and _usual(view, node)
        and _of_codes(carried_by(view, node.input[0], carried, set(passed)))
        == weights[(node.name, 1)].pair.codes
    )
    of_data = _of_data(view, carried, set(passed), weights)
    products = tuple(name for name in of_data if view.by_name[name].op_type == "MatMul")
    elementwise = tuple(name for name in of_data if name not in products)
    return Found(
        tuple(pairs), tuple(passed), tuple(strays), weights, roles, int8, products, elementwise
    )


def _of_data(
    view: GraphView,
    carried: Mapping[str, Pair],
    passed: set[str],
    weights: Mapping[Edge, WeightSource],
) -> tuple[str, ...]:
    """The MatMuls and operators on elements all of whose inputs, several, are data read through
    one scale each, as in attention, and where two branches meet."""
    found = []
    for node in view.nodes:
        known = node.op_type in ("MatMul", *ELEMENTWISE_OPS) and node.name not in view.shape_nodes
        if not known or len(node.input) < 2 or (node.name, 1) in weights:
            continue
        sides = [carried_by(view, name, carried, passed) for name in node.input]
        plain = all(has_one_scale(side) and not side[0].per_channel for side in sides)
        if plain and len({_of_codes(side) for side in sides}) == 1:
            found.append(node.name)
    return tuple(found)


def _usual(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether integer kernels exist for the node's form: two-dimensional weights in a MatMul, data
    of type float32 and not constant."""
    data, weight = node.input[0], node.input[1]
    flat = node.op_type != "MatMul" or len(view.shapes.get(weight, (0, 0))) == 2
    return flat and view.dtypes.get(data, "float32") == "float32" and not view.is_constant(data)


def quantize_before(
    view: GraphView, codes: str
) -> tuple[onnx.NodeProto, tuple[onnx.NodeProto, ...]] | None:
    """The QuantizeLinear that made `codes`, and the operators in between that only move codes
    about, the last first; None if there is none."""
    moved: list[onnx.NodeProto] = []
    while codes in view.producer:
        node = view.by_name[view.producer[codes]]
        if node.op_type == QUANTIZE:
            return node, tuple(moved)
        if not moves_codes(node, 0):
            return None
        moved.append(node)
        codes = node.input[0]
    return None


def _code_readers(view: GraphView, node: onnx.NodeProto) -> tuple[list[Edge], list[Edge]]:
    """Who reads the codes of a QuantizeLinear besides DequantizeLinears: movers, and others."""
    moved: list[Edge] = []
    others: list[Edge] = []
    for edge in view.consumers.get(node.output[0], ()):
        reader = view.by_name[edge[0]]
        if reader.op_type != DEQUANTIZE or edge[1] != 0:
            (moved if moves_codes(reader, edge[1]) else others).append(edge)
    return moved, others


def _value(view: GraphView, node: onnx.NodeProto, index: int) -> NDArray[Any] | None:
    name = node.input[index] if len(node.input) > index else ""
    return view.constant(name) if name and view.is_constant(name) else None


def _pair(view: GraphView, node: onnx.NodeProto, quantize: onnx.NodeProto | None) -> Pair:
    """The pair that ends in the DequantizeLinear `node`."""
    codes, result = node.input[0], node.output[0]
    zero_point = _value(view, node, 2)
    agrees = True
    if quantize is not None:
        agrees = all(
            _same(_value(view, node, k), _value(view, quantize, k)) for k in (1, 2)
        ) or list(node.input[1:]) == list(quantize.input[1:])
        dtype = _code_dtype(view, quantize)
    else:
        dtype = view.dtypes.get(codes, "")
    first = quantize if quantize is not None else node
    rank = len(view.shapes.get(codes, ())) or len(view.shapes.get(result, ()))
    axis = int(attribute(node, "axis", 1))
    return Pair(
        name=node.name,
        quantize=quantize.name if quantize is not None else "",
        source=first.input[0],
        result=result,
        scale=_value(view, node, 1),
        zero_point=zero_point,
        dtype=dtype,
        axis=axis + rank if axis < 0 else axis,
        constant=view.is_constant(first.input[0]),
        readers=view.consumers.get(result, ()),
        is_output=result in view.graph_outputs,
        agrees=agrees,
        blocked=bool(attribute(node, "block_size", 0)),
    )


def _moving_pair(view: GraphView, node: onnx.NodeProto, readers: list[Edge]) -> Pair:
    """The pair that begins with `node` and whose codes `readers` move about."""
    return Pair(
        name=node.name,
        quantize=node.name,
        source=node.input[0],
        result=node.output[0],
        scale=_value(view, node, 1),
        zero_point=_value(view, node, 2),
        dtype=_code_dtype(view, node),
        axis=int(attribute(node, "axis", 1)),
        constant=view.is_constant(node.input[0]),
        readers=tuple(readers),
        blocked=bool(attribute(node, "block_size", 0)),
    )


def _code_dtype(view: GraphView, quantize: onnx.NodeProto) -> str:
    """What a QuantizeLinear makes: its zero point's type, and uint8 without one."""
    zero_point = _value(view, quantize, 2)
    if zero_point is not None:
        return zero_point.dtype.name
    kind = int(attribute(quantize, "output_dtype", 0))
    if kind:
        return onnx.helper.tensor_dtype_to_np_dtype(kind).name
    return UINT8 if len(quantize.input) < 3 or not quantize.input[2] else ""


def blocks_fit(view: GraphView, pair: Pair) -> bool:
    """Whether blocks of a tensor lie along the axis that the pair names: on every other one there
    are as many scales as values. True where shapes are not known."""
    shape = view.shapes.get(pair.source, ())
    if pair.scale is None or pair.scale.ndim != len(shape):
        return True
    sizes = zip(shape, pair.scale.shape, strict=True)
    return all(size == scales for k, (size, scales) in enumerate(sizes) if k != pair.axis)


def _same(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and np.array_equal(a.reshape(-1), b.reshape(-1))


def _weights(view: GraphView, pairs: list[Pair]) -> dict[Edge, WeightSource]:
    made = {pair.result: pair for pair in pairs if pair.constant}
    found: dict[Edge, WeightSource] = {}
    for node in view.nodes:
        if node.op_type in COMPUTE_OPS:
            source = _weight_source(view, node.input[1], made)
            if source is not None:
                found[(node.name, 1)] = source
    return found


def _weight_source(view: GraphView, tensor: str, made: Mapping[str, Pair]) -> WeightSource | None:
    order: tuple[int, ...] | None = None
    while tensor not in made:
        node = view.by_name.get(view.producer.get(tensor, ""))
        rank = len(view.shapes.get(tensor, ()))
        if node is None or node.op_type != "Transpose" or not rank:
            return None
        own = tuple(attribute(node, "perm", tuple(reversed(range(rank)))))
        order = own if order is None else tuple(own[k] for k in order)
        tensor = node.input[0]
    return WeightSource(made[tensor], order)


def _role(view: GraphView, pair: Pair, weights: Mapping[Edge, WeightSource]) -> str:
    if not pair.constant:
        return ACTIVATION
    if any(source.pair is pair for source in weights.values()):
        return WEIGHT
    bias = pair.readers and all(
        index == 2 and view.by_name[name].op_type in COMPUTE_OPS for name, index in pair.readers
    )
    return BIAS if bias or pair.dtype == "int32" else CONSTANT


def carried_by(
    view: GraphView,
    tensor: str,
    carried: Mapping[str, Pair],
    passed: set[str] | frozenset[str],
    *,
    as_codes: bool = False,
) -> tuple[Pair, ...]:
    """The pairs whose values `tensor` holds, through nothing but operators that pass them on; () if
    some of its values come from elsewhere. With `as_codes` it is codes that are passed on."""
    if tensor in carried:
        return (carried[tensor],)
    node = view.by_name.get(view.producer.get(tensor, ""))
    if node is None:
        return ()
    if node.name in passed:
        return carried_by(view, node.input[0], carried, passed, as_codes=True)
    found: list[Pair] = []
    for index, name in enumerate(node.input):
        if moves_codes(node, index) if as_codes else carries(node, index, view):
            pairs = carried_by(view, name, carried, passed, as_codes=as_codes)
            if not pairs:
                return ()
            found.extend(pairs)
    return tuple(dict.fromkeys(found)) if found else ()


def reads_stray(view: GraphView, found: Found, tensor: str) -> bool:
    """Whether `tensor` is what a DequantizeLinear of codes from outside gives, also passed on."""
    while tensor in view.producer:
        node = view.by_name[view.producer[tensor]]
        if node.op_type == DEQUANTIZE:
            return node.name in found.strays
        if not carries(node, 0, view):
            return False
        tensor = node.input[0]
    return False


def multiplies_codes(view: GraphView, found: Found, node: onnx.NodeProto) -> bool:
    """Whether a MatMul reads nothing but dequantized tensors, data or constants in any form."""
    carried = {pair.result: pair for pair in found.pairs}
    passed = set(found.passed)
    sides = [carried_by(view, tensor, carried, passed) for tensor in node.input[:2]]
    return node.op_type == "MatMul" and all(sides)


def has_one_scale(pairs: tuple[Pair, ...]) -> bool:
    """Whether there are pairs, all with the same scale and zero point."""
    return bool(pairs) and all(
        _same(pair.scale, pairs[0].scale) and _same(pair.zero_point, pairs[0].zero_point)
        for pair in pairs[1:]
    )


def _of_codes(pairs: tuple[Pair, ...]) -> str:
    """int8 or fp8, what pairs of one scale carry; empty for others."""
    return pairs[0].codes if has_one_scale(pairs) else ""


def codes_of(view: GraphView, pair: Pair) -> NDArray[np.int64]:
    """The codes of a constant integer pair, stored or as QuantizeLinear makes them, as int64.

    Raises ValueError if the pair is not constant or its scale is not.
    """
    if not pair.constant or pair.scale is None:
        raise ValueError(f"pair {pair.name!r} has no constant codes")
    if not pair.quantize:
        return view.constant(pair.source).astype(np.int64)
    value = view.constant(pair.source).astype(np.float32)
    info = np.iinfo(pair.dtype)
    with np.errstate(all="ignore"):
        codes = np.rint(value / spread(pair.scale.astype(np.float32), value.ndim, pair.axis))
        codes = np.nan_to_num(codes + spread(pair.zero_points, value.ndim, pair.axis))
    clipped: NDArray[np.int64] = np.clip(codes, info.min, info.max).astype(np.int64)
    return clipped


def dequantized(view: GraphView, pair: Pair) -> NDArray[np.float32]:
    """What a constant pair gives: (codes - zero point) * scale, multiplied in float32."""
    if pair.codes == "fp8":
        return _dequantized_float8(view, pair)
    codes = codes_of(view, pair)
    assert pair.scale is not None
    whole = (codes - spread(pair.zero_points, codes.ndim, pair.axis)).astype(np.float32)
    value: NDArray[np.float32] = whole * spread(
        pair.scale.astype(np.float32), codes.ndim, pair.axis
    )
    return value


def _dequantized_float8(view: GraphView, pair: Pair) -> NDArray[np.float32]:
    assert pair.scale is not None
    value = view.constant(pair.source).astype(np.float32)
    scale = spread(pair.scale.astype(np.float32), value.ndim, pair.axis)
    codes = float8_codes(value / scale) if pair.quantize else value
    found: NDArray[np.float32] = codes.astype(np.float32) * scale
    return found


def spread(values: NDArray[Any], rank: int, axis: int) -> NDArray[Any]:
    """`values`, one or one a channel, in a shape that broadcasts along `axis` of `rank` axes."""
    if values.size == 1:
        return values.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)
