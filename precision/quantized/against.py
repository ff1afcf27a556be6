"""What the linter expects of the compiler, and what the compiler did with the file as it stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx

from trtune.precision.graph.view import GraphView, Model
from trtune.precision.plan.plan import COMPUTE_OPS, QUANTIZED
from trtune.precision.quantized.find import (
    ACTIVATION,
    UINT8,
    Found,
    Pair,
    carried_by,
    find_quantization,
    multiplies_codes,
    reads_stray,
)
from trtune.precision.quantized.findings import BEYOND_INT8, ERROR, Finding
from trtune.precision.quantized.forms.clipped_codes import with_clips_in_front
from trtune.precision.quantized.forms.float_types import in_full_precision
from trtune.precision.quantized.forms.moved_weights import with_weights_in_place
from trtune.precision.quantized.strip import renormalised

REFUSED_KINDS = frozenset(
    {
        *("uint8-zero-point-128", "uint8", "int8-zero-point", "int32-bias", "bad-scale"),
        *("scale-type", "half-model", "code-type", "blocked-scale", "non-constant-scale"),
        *("block-axis", "scalar-constant", "computed-codes", "foreign-quantizer"),
        *("integer-operator", "dynamic-quantization"),
    }
)
"""Kinds of findings with which TensorRT gives no engine at all."""
NEVER_INT8 = ("ConvTranspose",)
CONV_ALONE = "scale-shape"
"""What keeps a convolution out of int8, and matrix products not."""
UNTOLD = ("", "unknown")
NO_ZERO_POINT = "missing-zero-point"
AS_MEANT = ("axis-before-opset-13", NO_ZERO_POINT, "pair-disagrees", "subnormal-scale")
"""Errors in spite of which the compiler takes int8 kernels."""


@dataclass(frozen=True, slots=True)
class Product:
    """A product of the file: what the linter expects it to run in (int8, fp8 or float; "" where it
    has no say), and what it came out in ("" if there is no engine)."""

    node: str
    expected: str
    found: str

    @property
    def agrees(self) -> bool:
        """Whether the two say the same; what either does not know is no contradiction."""
        if not self.expected or self.found in UNTOLD:
            return True
        return self.expected == (self.found if self.found in QUANTIZED else "float")


@dataclass(frozen=True, slots=True)
class Agreement:
    """A file seen by the linter and by the compiler.

    `refused` are the compiler's words if it gave no engine, `expected_refusal` the kinds of
    findings that say that it gives none.
    """

    products: tuple[Product, ...]
    refused: str = ""
    expected_refusal: tuple[str, ...] = ()

    @property
    def disagreements(self) -> tuple[str, ...]:
        """A sentence for each thing that the two see otherwise."""
        return tuple(self._disagreements())

    def _disagreements(self) -> Iterator[str]:
        if self.refused and not self.expected_refusal:
            yield f"the compiler refuses the file, and no finding says so: {self.refused}"
        if not self.refused and self.expected_refusal:
            kinds = ", ".join(self.expected_refusal)
            yield f"findings say that the compiler refuses the file ({kinds}), and it built it"
        if not self.expected_refusal:
            for product in self.products:
                if not product.agrees:
                    yield (
                        f"{product.node}: the linter expects {product.expected}, and it runs in "
                        f"{product.found}"
                    )

    def of(self, node: str) -> str:
        """What a product came out in, "" for every other node."""
        return next((p.found for p in self.products if p.node == node), "")


def against_builder(
    original: Model, rows: Iterable[Finding], *, refused: str, precisions: Mapping[str, str]
) -> Agreement:
    """Compare `rows`, the linter's findings of `original`, with a build of that file.

    `refused` are the compiler's words ("" if it built), `precisions` what each node runs in.
    """
    rows = tuple(rows)
    wide, _, _ = in_full_precision(original.proto)
    view = GraphView.of(renormalised(original, wide))
    narrow, _ = with_clips_in_front(view.proto, view)
    if narrow is not view.proto:
        view = GraphView.of(renormalised(original, narrow))
    placed = with_weights_in_place(view.proto, view)
    if placed is not view.proto:
        view = GraphView.of(renormalised(original, placed))
    found = find_quantization(view)
    misread = {pair.node for pair in found.pairs if pair.dtype == UINT8 and _around_zero(pair)}
    # uint8 around 0 or with no zero point is not refused but read as int8: wrong values, and int8
    # kernels all the same
    taken = [
        row
        for row in rows
        if row.kind != NO_ZERO_POINT
        and not (row.kind == UINT8 and (row.node in misread or row.node not in view.by_name))
    ]
    kinds = tuple(dict.fromkeys(row.kind for row in taken if row.kind in REFUSED_KINDS))
    wrong = {r.node: r.kind for r in taken if r.severity == ERROR and r.kind not in AS_MEANT}
    unsure = {row.node for row in rows if row.kind in BEYOND_INT8}
    products = tuple(
        Product(name, _expected(view, found, name, wrong, unsure), precisions.get(name, ""))
        for name in _products(view, found)
    )
    return Agreement(products, refused, kinds)


def _around_zero(pair: Pair) -> bool:
    return not pair.zero_points.any()


def _products(view: GraphView, found: Found) -> list[str]:
    """The products, and what else is quantized on all its inputs."""
    asked = {*found.elementwise}
    return [n.name for n in view.nodes if n.op_type in COMPUTE_OPS or n.name in asked]


def _expected(
    view: GraphView, found: Found, name: str, wrong: Mapping[str, str], unsure: set[str]
) -> str:
    pairs = {pair.node for pair in feeding(view, found, name)}
    quantized = name in (*found.int8, *found.products)
    if pairs & unsure or name in found.elementwise:  # which kernel dequantizes is the compiler's
        return ""
    if not quantized and _is_open(view, found, view.by_name[name]):
        return ""
    op = view.by_name[name].op_type
    kinds = {wrong[pair] for pair in pairs if pair in wrong}
    hinders = kinds if op == "Conv" else kinds - {CONV_ALONE}
    if not quantized or op in NEVER_INT8 or hinders:
        return "float"
    return "fp8" if any(pair.codes == "fp8" for pair in feeding(view, found, name)) else "int8"


def _is_open(view: GraphView, found: Found, node: onnx.NodeProto) -> bool:
    """Whether what the compiler makes of a product that is not taken over as int8 is its own.

    It folds a factor between data and a product into the scale, takes codes that come from outside,
    and multiplies with quantized constants in other forms than weights have.
    """
    if reads_stray(view, found, node.input[0]):
        return True
    carried = {pair.result: pair for pair in found.pairs}
    passed = set(found.passed)
    data = node.input[0]
    while data in view.producer and not carried_by(view, data, carried, passed):
        maker = view.by_name[view.producer[data]]
        scalar = [k for k, t in enumerate(maker.input) if view.is_constant(t)]
        if maker.op_type not in ("Mul", "Div") or len(scalar) != 1:
            break
        if view.constant(maker.input[scalar[0]]).size != 1:
            break
        data = maker.input[1 - scalar[0]]
        if carried_by(view, data, carried, passed) and (node.name, 1) in found.weights:
            return True
    return multiplies_codes(view, found, node)


def feeding(view: GraphView, found: Found, name: str) -> tuple[Pair, ...]:
    """The pairs that a product reads its data and weights through, also behind moving operators."""
    carried = {pair.result: pair for pair in found.of_role(ACTIVATION)}
    passed = set(found.passed)
    node = view.by_name[name]
    pairs = [p for t in node.input[:2] for p in carried_by(view, t, carried, passed)]
    weights = found.weights.get((name, 1))
    return tuple(dict.fromkeys([*pairs, *([weights.pair] if weights else [])]))
