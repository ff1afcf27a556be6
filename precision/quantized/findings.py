"""A finding about a model's quantization, the kinds there are, and what TensorRT does with each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

ERROR, WARNING, INFO = "error", "warning", "info"
EXACT, REQUANTIZE, NONE = "exact", "requantize", ""

_SAYS = {
    "uint8-zero-point-128": (ERROR, "refuses a zero point other than 0"),
    "uint8": (ERROR, "refuses a zero point other than 0, and reads uint8 around 0 as int8"),
    "int8-zero-point": (ERROR, "refuses a zero point other than 0"),
    "missing-zero-point": (ERROR, "reads the codes as int8 without a word; ONNX means uint8"),
    "scale-shape": (ERROR, "takes it, and computes in float without a word"),
    "int32-bias": (ERROR, "refuses int32 behind a DequantizeLinear; biases stay float"),
    "per-channel-activation": (ERROR, "takes it, and computes in float without a word"),
    "weight-axis": (ERROR, "takes it, and computes in float without a word"),
    "transposed-axis": (INFO, "takes it; TensorRT-RTX computes every ConvTranspose in float"),
    "bad-scale": (ERROR, "refuses scales that are not above zero"),
    "subnormal-scale": (ERROR, "takes it, though a GPU may read such a scale as zero"),
    "scale-type": (ERROR, "gives the data the scale's type, and refuses the node behind"),
    "fp8": (INFO, "takes FP8 from compute capability 8.9 on, and computes in it"),
    "own-fp8": (INFO, "parses its own FP8 operators too"),
    "mxfp8": (ERROR, "takes FP8 in blocks from compute capability 10.0 on"),
    "int4": (ERROR, "takes INT4 weights in blocks: they are stored so, and computed in float"),
    "fp4": (ERROR, "takes FP4 in blocks from compute capability 10.0 on"),
    "foreign-quantizer": (ERROR, "cannot parse it"),
    "code-type": (ERROR, "refuses such codes"),
    "pair-disagrees": (ERROR, "takes it without a word"),
    "block-axis": (ERROR, "refuses scales of blocks along another axis than the one named"),
    "blocked-scale": (ERROR, "knows scales for blocks in INT4 and FP4 weights only"),
    "non-constant-scale": (ERROR, "wants every scale to be constant"),
    "quantize-alone": (ERROR, "takes integer tensors, but no float model is left without them"),
    "dequantize-alone": (ERROR, "takes integer tensors, but no float model is left without them"),
    "half-model": (ERROR, "takes half scales around half data from opset 19 on"),
    "half-rest": (INFO, "computes in that type what is not quantized"),
    "axis-before-opset-13": (ERROR, "takes it, while onnxruntime and the ONNX checker refuse it"),
    "integer-operator": (ERROR, "cannot parse integer operators"),
    "dynamic-quantization": (ERROR, "cannot parse it: scales are constant there"),
    "unequal-scales": (WARNING, "computes in float what reads them together"),
    "shared-dequantize": (INFO, "gives each reader what it needs"),
    "weights-alone": (WARNING, "computes in float: it only stores such weights in int8"),
    "activation-alone": (WARNING, "computes in float; the pair costs time and accuracy"),
    "pair-before-activation": (WARNING, "computes in float what reads the activation"),
    "pair-before-resize": (WARNING, "resizes in float, and computes so what reads the result"),
    "pair-before-pad": (WARNING, "pads in float, and computes so what reads the result"),
    "clipped-codes": (INFO, "takes it, and computes what is behind it in int8"),
    "computed-codes": (ERROR, "refuses: a quantized constant stands before DequantizeLinear alone"),
    "nothing-int8": (WARNING, "computes every product in float"),
    "residual": (WARNING, "adds in float, and moves four times the bytes"),
    "spare-pair": (WARNING, "runs it as nodes of their own: no int8 kernel is behind it"),
    "inside-subgraph": (WARNING, "takes it, with kernels of its own choice in each branch"),
    "inside-float": (WARNING, "loses its fused softmax or normalisation kernel"),
    "scalar-constant": (ERROR, "refuses stored codes without an axis"),
    "constant-pair": (INFO, "takes int8 and refuses uint8"),
}
"""What TensorRT does with each, as TensorRT-RTX 1.7 was seen to do where it could be tried."""
BEYOND_INT8 = frozenset({"mxfp8", "int4", "fp4"})
"""Types that TensorRT knows and that are not taken over."""
TENSORRT = MappingProxyType({kind: says for kind, (_, says) in _SAYS.items()})
SEVERITY = MappingProxyType({kind: severity for kind, (severity, _) in _SAYS.items()})


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about a node's quantization.

    `found` says what is there, `tensorrt` what TensorRT would do with it, `remedy` what was done
    or is to be done. `repair` is "exact" (the same values come out), "requantize" (they change) or
    "" (nothing here can), `repaired` whether it was applied.
    """

    node: str
    kind: str
    severity: str
    found: str
    tensorrt: str
    remedy: str
    repair: str = NONE
    repaired: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The finding as values that `json.dumps` accepts."""
        return asdict(self)

    @property
    def blocks(self) -> bool:
        """Whether the model cannot be used because of it."""
        return self.severity == ERROR and not self.repaired


def finding(node: str, kind: str, found: str, remedy: str, repair: str = NONE) -> Finding:
    """A finding of a known kind, not repaired yet."""
    return Finding(node, kind, SEVERITY[kind], found, TENSORRT[kind], remedy, repair)


def outcome(row: Finding) -> str:
    """What became of a finding, in a word or two.

    >>> outcome(finding("q", "half-rest", "", ""))
    'Kept'
    """
    if row.repaired:
        return "Repaired"
    return "Kept" if row.severity == INFO and row.repair == NONE else "Not repaired"


def summary(findings: Iterable[Finding]) -> list[str]:
    """One line for each kind, severity and outcome, errors first: how many nodes, and an example.

    >>> summary([finding("q", "int32-bias", "a bias in int32", "float", EXACT)])
    ['error: int32-bias, 1 node (q: a bias in int32): TensorRT refuses int32 behind a \
DequantizeLinear; biases stay float. Not repaired, exact: float']
    """
    groups: dict[tuple[str, str, bool, str], list[Finding]] = {}
    for row in findings:
        groups.setdefault((row.severity, row.kind, row.repaired, row.repair), []).append(row)
    rank = {ERROR: 0, WARNING: 1, INFO: 2}
    lines = []
    for (severity, kind, _, repair), rows in sorted(
        groups.items(), key=lambda item: (rank[item[0][0]], item[0][2], item[0][1], item[0][3])
    ):
        first, count = rows[0], len({row.node for row in rows})
        done = outcome(first)
        how = f", {repair}" if repair else ""
        lines.append(
            f"{severity}: {kind}, {count} node{'s' if count != 1 else ''} ({first.node}: "
            f"{first.found}): TensorRT {first.tensorrt}. {done}{how}: {first.remedy}"
        )
    return lines


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """How many findings there are of each kind, most first."""
    return dict(Counter(row.kind for row in findings).most_common())
