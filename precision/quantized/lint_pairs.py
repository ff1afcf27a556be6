"""Rules for one pair each: its scale, zero point, types, axis, and who reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

import numpy as np

from trtune.precision.graph.view import GraphView
from trtune.precision.plan.placement import carries
from trtune.precision.plan.plan import COMPUTE_OPS
from trtune.precision.plan.rules import weight_axis
from trtune.precision.quantized.find import (
    ACTIVATION,
    BIAS,
    CONSTANT,
    FLOAT8,
    WEIGHT,
    Found,
    Pair,
    blocks_fit,
)
from trtune.precision.quantized.findings import EXACT, NONE, REQUANTIZE, Finding, finding
from trtune.precision.quantized.repair import (
    TINY,
    channel_axis,
    cuts_at_zero,
    float_range,
    is_shifted,
    symmetric_activation,
    symmetric_weights,
)

NORMALISING = frozenset(
    {
        *("Softmax", "LogSoftmax", "LayerNormalization", "GroupNormalization"),
        *("InstanceNormalization", "RMSNormalization"),
    }
)
PARTS = frozenset(("Exp", "ReduceSum", "ReduceMean", "ReduceMax", "Sub", "Div", "Pow", "Sqrt"))
"""What softmax and normalisation are made of when they are written out."""
SIGNS = frozenset(("Exp", "Pow", "Sqrt"))
INTEGER_TYPES = ("int8", "uint8")
FOLDED_BEFORE = ("Identity", "Cast")
"""What TensorRT takes between stored codes and their DequantizeLinear."""
KNOWN_CODES: Mapping[str, str] = MappingProxyType(
    {FLOAT8: "fp8", "int4": "int4", "float4_e2m1fn": "fp4"}
)
"""Codes that TensorRT takes and that are not int8."""


def _scale_known(view: GraphView, found: Found, pair: Pair) -> Iterator[Finding]:
    node = view.by_name[pair.name]
    computed = [name for name in node.input[1:3] if name and not view.is_constant(name)]
    if computed:
        yield finding(
            pair.node,
            "non-constant-scale",
            f"its scale or zero point is computed at run time ({', '.join(computed)})",
            "export with static quantization, or quantize the FP32 model here",
        )


def _scale_values(view: GraphView, found: Found, pair: Pair) -> Iterator[Finding]:
    if pair.scale is None:
        return
    values = pair.scale.astype(np.float64).reshape(-1)
    shown = ", ".join(f"{v:g}" for v in values[~(values >= TINY)][:3])
    if np.any(~np.isfinite(values) | (values <= 0)):
        harmless = _weights_survive(view, found, pair, zero=True)
        yield finding(
            pair.node,
            "bad-scale",
            f"scale {shown}" + (f" of {pair.scale.size}" if pair.per_channel else ""),
            "its channels hold only zeros: scale 1 instead"
            if harmless
            else "export it again: no value comes back from such a scale",
            EXACT if harmless else NONE,
        )
    elif np.any(values < TINY):
        weight = _weights_survive(view, found, pair, zero=False)
        yield finding(
            pair.node,
            "subnormal-scale",
            f"scale {shown}",
            "weights below 1e-35 become zero" if weight else "export it again, or calibrate",
            REQUANTIZE if weight else NONE,
        )


def _weights_survive(view: GraphView, found: Found, pair: Pair, *, zero: bool) -> bool:
    """Whether a scale that is no normal positive number belongs to constants that need none.

    With `zero` every channel concerned must hold nothing but zeros.
    """
    assert pair.scale is not None
    if found.roles[pair.name] == ACTIVATION or not np.all(np.isfinite(pair.scale)):
        return False
    if np.any(pair.scale < 0):
        return False
    if not zero:
        return True
    if not pair.quantize:
        return True  # whatever the codes are, times zero they are zero
    bad = np.broadcast_to(~(pair.scale > 0), pair.scale.shape)
    value = view.constant(pair.source)
    if not pair.per_channel:
        return not np.any(value)
    return not np.any(np.moveaxis(value, pair.axis, 0)[bad.reshape(-1)])


def _scale_shape(view: GraphView, found: Found, pair: Pair) -> Iterator[Finding]:
    if pair.scale is None or pair.scale.shape != (1,) or found.roles[pair.name] == BIAS:
        return
    if found.roles[pair.name] != ACTIVATION:
        shape = view.shapes.get(pair.result, ())
        if len(shape) > pair.axis and shape[pair.axis] == 1:
            return
    yield finding(
        pair.node, "scale-shape", "scale of shape [1]", "a 0-d scale with the same value", EXACT
    )


def _types(view: GraphView, found: Found, pair: Pair) -> Iterator[Finding]:
    held = pair.scale.dtype.name if pair.scale is not None else "float32"
    if held not in ("float32", "float16", "bfloat16"):
        yield finding(
            pair.node, "scale-type", f"scale in {held}", "the scale in float32", REQUANTIZE
        )
    allowed = (*INTEGER_TYPES, *(("int32",) if found.roles[pair.name] != ACTIVATION else ()))
    kind = KNOWN_CODES.get(pair.dtype, "")
    if kind == "fp8" and not pair.blocked:
        if np.any(pair.zero_points):
            yield finding(
                pair.node, "code-type", "float8 with a zero point other than 0", "export it again"
            )
        else:
            kept = "taken over as it is; it needs compute capability 8.9"
            yield finding(pair.node, "fp8", f"codes of type {pair.dtype}", kept)
    elif kind:
        blocks = ", one scale a block" if pair.blocked else ""
        yield finding(
            pair.node,
            "mxfp8" if kind == "fp8" and pair.blocked else kind,
            f"codes of type {pair.dtype}{blocks}",
            "give the float model, to be quantized to int8 here",
        )
    elif pair.dtype not in allowed:
        yield finding(
            pair.node,
            "code-type",
            f"codes of type {pair.dtype or 'unknown'}",
            "export with int8 codes",
        )
    if pair.blocked and not kind:
        yield finding(
            pair.node, "blocked-scale", "one scale a block", "export with one scale a channel"
        )
    if pair.blocked and not blocks_fit(view, pair):
        yield finding(
            pair.node,
            "block-axis",
            f"blocks along axis {pair.axis}, scales along another",
            "export it again",
        )
    if not pair.agrees:
        yield finding(
            pair.node,
            "pair-disagrees",
            f"{pair.quantize} and {pair.name} have different scales or zero points",
            "export it again",
        )


def _computed_codes(view: GraphView, found: Found, pair: Pair) -> Iterator[Finding]:
    if pair.quantize or not pair.constant:
        return
    maker = view.by_name.get(view.producer.get(pair.source, ""))
    while maker is not None and maker.op_type in FOLDED_BEFORE:
        maker = view.by_name.get(view.producer.get(maker.input[0], ""))
    if maker is not None and maker.input:
        yield finding(
            pair.node,
            "computed-codes",
            f"its codes are computed by {maker.name} ({maker.op_type})",
            "the codes that come out, stored",
            EXACT,
        )


def _zero_point(view: GraphView, found: Found, pair: Pair) -> Iterator[Finding]:
    role = found.roles[pair.name]
    if role in (BIAS, CONSTANT) or pair.dtype not in INTEGER_TYPES or not _readable(pair):
        return
    fits = symmetric_kind(view, found, pair)
    if pair.zero_point is None:
        implied = pair.dtype == "uint8" and bool(pair.quantize)
        if implied:
            yield finding(
                pair.node,
                "missing-zero-point",
                f"no zero point, which in ONNX means uint8 and 0 (range {_range(pair)})",
                _symmetric_text(view, found, pair, fits),
                fits,
            )
            return
        if pair.dtype == "int8":
            return
    points = np.unique(pair.zero_points).tolist()
    shown = ", ".join(map(str, points[:4])) + (", ..." if len(points) > 4 else "")
    if is_shifted(pair) and role == ACTIVATION:
        yield finding(
            pair.node,
            "uint8-zero-point-128",
            "uint8 with zero point 128",
            "int8 with zero point 0: the codes less 128",
            fits,
        )
    elif pair.dtype == "uint8":
        yield finding(
            pair.node,
            "uint8-zero-point-128" if is_shifted(pair) else "uint8",
            f"uint8 with zero point {shown} (range {_range(pair)})",
            _symmetric_text(view, found, pair, fits),
            fits,
        )
    elif points != [0]:
        yield finding(
            pair.node,
            "int8-zero-point",
            f"int8 with zero point {shown} (range {_range(pair)})",
            _symmetric_text(view, found, pair, fits),
            fits,
        )


def _readable(pair: Pair) -> bool:
    return pair.scale is not None and not pair.blocked and bool(np.all(np.isfinite(pair.scale)))


def symmetric_kind(view: GraphView, found: Found, pair: Pair) -> str:
    """Whether making a pair symmetric is exact, or needs new scales."""
    if found.roles[pair.name] == ACTIVATION:
        return EXACT if symmetric_activation(pair).exact else REQUANTIZE
    uses = [edge for edge, source in found.weights.items() if source.pair is pair]
    exact = all(
        edge[0] not in found.int8
        or symmetric_weights(
            view, found.weights[edge], channel_axis(view.by_name[edge[0]], found.weights[edge])
        ).exact
        for edge in uses
    )
    return EXACT if exact else REQUANTIZE


def _range(pair: Pair) -> str:
    low, high = float_range(pair)
    return f"{low:.4g}..{high:.4g}"


def _symmetric_text(view: GraphView, found: Found, pair: Pair, repair: str) -> str:
    assert pair.scale is not None
    if repair == EXACT:
        return "int8 with zero point 0: every code less its zero point fits"
    if found.roles[pair.name] == ACTIVATION:
        after = float(symmetric_activation(pair).scales[0])
        ratio = after / float(pair.scale.max())
        cut = ", and a Relu where only the range cut at 0" if cuts_at_zero(pair) else ""
        return f"a symmetric range, whose step is {ratio:.3g} times as large{cut}"
    return "new scales, one an output channel: max|w| / 127 where the codes do not fit int8"


def _bias(view: GraphView, found: Found, pair: Pair) -> Iterator[Finding]:
    role = found.roles[pair.name]
    if role == BIAS and pair.dtype == "int32":
        yield finding(
            pair.node,
            "int32-bias",
            "a bias in int32 behind a DequantizeLinear",
            "float, the values that it gave",
            EXACT,
        )
    elif role in (BIAS, CONSTANT):
        scalar = not pair.quantize and view.shapes.get(pair.source) == ()
        kind = "scalar-constant" if scalar else "constant-pair"
        found_here = "a constant that is no weight, quantized"
        yield finding(pair.node, kind, found_here, "float, the values that it gave", EXACT)


def _channels(view: GraphView, found: Found, pair: Pair) -> Iterator[Finding]:
    role = found.roles[pair.name]
    if not pair.per_channel or not _readable(pair):
        return
    assert pair.scale is not None
    if role == ACTIVATION:
        repair = symmetric_kind(view, found, pair)
        yield finding(
            pair.node,
            "per-channel-activation",
            f"{pair.scale.size} scales on an activation, {pair.scale.min():.4g} to "
            f"{pair.scale.max():.4g}",
            "one scale, the largest",
            repair,
        )
    for (name, _), source in found.weights.items():
        if role != WEIGHT or source.pair is not pair:
            continue
        axis = channel_axis(view.by_name[name], source)
        if axis != weight_axis(view.by_name[name]):
            yield finding(
                pair.node,
                "transposed-axis",
                f"the weights of {name}, a ConvTranspose, have scales along axis {axis}, its input "
                "channels",
                "kept as they are, bit for bit",
                NONE,
            )
        if source.axis != axis:
            yield finding(
                pair.node,
                "weight-axis",
                f"the weights of {name} have scales along axis {source.axis}; its output channels "
                f"are axis {axis}",
                f"new scales along axis {axis}",
                REQUANTIZE if name in found.int8 else EXACT,
            )


def _shared(view: GraphView, found: Found, pair: Pair) -> Iterator[Finding]:
    if found.roles[pair.name] != ACTIVATION:
        return
    integer: list[str] = []
    floating = ["an output of the model"] if pair.is_output else []
    products = {*found.int8, *found.products}
    for name, index in final_readers(view, pair):
        node = view.by_name[name]
        wants_float = (
            node.op_type in NORMALISING
            or (node.op_type in COMPUTE_OPS and (index > 1 or name not in products))
            or node.op_type in PARTS
        )
        (floating if wants_float else integer).append(name)
    if integer and floating:
        yield finding(
            pair.node,
            "shared-dequantize",
            f"read by {listed(integer)}, which can take int8, and {listed(floating)} in float",
            "all of them read the pair, as in the file",
            EXACT,
        )


def final_readers(view: GraphView, pair: Pair) -> list[tuple[str, int]]:
    """Who reads what a pair gives, behind operators that only move it."""
    found: list[tuple[str, int]] = []
    waiting, seen = list(pair.readers), set(pair.readers)
    while waiting:
        name, index = waiting.pop(0)
        node = view.by_name[name]
        if not carries(node, index, view):
            found.append((name, index))
            continue
        onward = [edge for output in node.output for edge in view.consumers.get(output, ())]
        waiting += [edge for edge in onward if edge not in seen]
        seen.update(onward)
    return found


def _inside_float(view: GraphView, found: Found, pair: Pair) -> Iterator[Finding]:
    if found.roles[pair.name] != ACTIVATION:
        return
    maker = view.by_name.get(view.producer.get(pair.source, ""))
    before = maker.op_type if maker is not None else ""
    for name, index in final_readers(view, pair):
        op = view.by_name[name].op_type
        written_out = before in PARTS and op in PARTS and (before in SIGNS or op in SIGNS)
        if (op in NORMALISING and index == 0) or written_out:
            yield finding(
                pair.node,
                "inside-float",
                f"a pair before {op} ({name}), which belongs to softmax or normalisation",
                "left as it is; without it that part runs in float at full speed",
            )
            return


PairRule = Callable[[GraphView, Found, Pair], Iterable[Finding]]
PAIR_RULES: tuple[PairRule, ...] = (
    _scale_known,
    _scale_values,
    _scale_shape,
    _types,
    _computed_codes,
    _zero_point,
    _bias,
    _channels,
    _shared,
    _inside_float,
)


def listed(names: Iterable[str]) -> str:
    """'a, b, c and 2 more'."""
    every = list(dict.fromkeys(names))
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")
