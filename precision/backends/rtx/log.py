"""What TensorRT-RTX's compiler says that it built: the kernels in its verbose log.

Without a GPU there is no engine inspector, but the log has one message that begins with `Layers:`
and a line a kernel. It is a log, not an API: what is not exactly as it was recorded with 1.7 gives
"unknown", never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from trtune.precision.backends.rtx.elementwise import ReadCodes
from trtune.precision.plan.plan import COMPUTE, QUANTIZED, SHAPE, PrecisionPlan
from trtune.precision.runtime.api import UNKNOWN
from trtune.precision.runtime.not_honoured import not_honoured

HEADLINE = re.compile(r"^(?:\[\w\] )?Layers:$")
KERNEL = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], "
    r"TacticName: .*?, StreamId: \d+(?:, \w+: [^,\[\]{}]+)*, Metadata: (?P<metadata>.*)"
)
TENSOR_TEXT = re.compile(
    r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<dims>[-\d,]*)\], Strides: \[.*?\], "
    r"StrideOrder: \[.*?\], Datatype: (?P<dtype>\w+), Format: .*?\}"
)
NODE = re.compile(r"\[ONNX Layer: (.*?)\][\w.+-]*(?=[\x1e\x1f]|$)")
PRECISION_OF_DATATYPE = MappingProxyType(
    {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "Int8": "int8", "FP8": "fp8"}
)
GENERATED = "kgen"
"""The type of the kernels that the compiler writes itself: pointwise work, moves, reductions."""
COMPOSED = "__myl_"
"""How the names of generated kernels begin that tell their steps, such as __myl_CastMeanSub."""
ATTENTION = "_gemm_mha"
"""How the names of its fused attention kernels begin, which multiply what they read."""
CONTROL = frozenset({"cjmp", "copy", "jmp", "memset", "shape_call", "signal", "wait"})
"""What computes no tensor of the network."""
WITH_WEIGHTS = frozenset({"correlation", "deconv", "gemm"})
"""Library kernels, whose first constant is the weights (or a scalar, if both are inputs)."""
PRODUCT_LAYERS = WITH_WEIGHTS | {"runtime_fusion"}
FLOATS = ("fp32", "bf16", "fp16")
WIDEST_FIRST = (*FLOATS, *QUANTIZED)


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that a kernel reads or writes; a free dimension is -1."""

    name: str
    dims: tuple[int, ...]
    dtype: str

    @property
    def precision(self) -> str:
        """int8, fp8, fp16, bf16, fp32, or "unknown" for every other type."""
        return PRECISION_OF_DATATYPE.get(self.dtype, UNKNOWN)

    @property
    def is_matrix(self) -> bool:
        """Whether more than one dimension is larger than 1: weights, not scales or biases."""
        return sum(dim != 1 for dim in self.dims) > 1


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of an engine, with the ONNX nodes whose work it does a part of."""

    name: str
    kind: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    nodes: tuple[str, ...]

    @property
    def precision(self) -> str:
        """What the kernel computes in; "unknown" if that cannot be told.

        A kernel that multiplies runs in int8 or fp8 only if both factors are, else in the float's
        type: it may read int8 data, cast it, and multiply it with float weights. A generated one
        runs in the only float type that it touches, unless its name tells of a cast to another.
        """
        if self.kind == GENERATED:
            return self._generated
        factors = self.factors
        found = {factor.precision for factor in factors}
        floats = found - {*QUANTIZED}
        if not factors or UNKNOWN in found or len(floats or found) > 1:
            return UNKNOWN
        return (floats or found).pop()

    @property
    def factors(self) -> tuple[Operand, ...]:
        """What is multiplied: the data and the weights, as far as they can be told; else empty."""
        if not self.inputs:
            return ()
        data, others = self.inputs[0], (*self.inputs[1:], *self.constants)
        if self.kind in WITH_WEIGHTS:
            constant = any(dim != 1 for first in self.constants[:1] for dim in first.dims)
            weights = self.constants[:1] if constant else self.inputs[1:2]
            return (data, *weights) if weights else ()
        return (data, *(operand for operand in others if operand.is_matrix))

    @property
    def _generated(self) -> str:
        touched = {o.precision for o in (*self.inputs, *self.constants, *self.outputs)}
        floats = touched & set(FLOATS)
        if len(floats) != 1:
            return touched.pop() if touched in ({"int8"}, {"fp8"}) else UNKNOWN
        only = floats.pop()
        casts = "Cast" in self.name or not self.name.startswith(COMPOSED)
        if casts and not (only == "fp32" and touched & {*QUANTIZED}):
            return UNKNOWN
        return only


@dataclass(frozen=True, slots=True)
class Account:
    """What a node runs in, and the kernels that this was read from."""

    precision: str
    kernels: tuple[Kernel, ...] = ()


def read_kernels(log: str) -> tuple[Kernel, ...] | None:
    """The kernels that the verbose log of a build lists, in its order; None if it has no such list.

    None too if a line of the list is not as it was in the version that this was written for.
    """
    lines = log.split("\n")
    starts = [number for number, line in enumerate(lines) if HEADLINE.match(line)]
    if not starts:
        return None
    kernels = []
    for line in lines[starts[-1] + 1 :]:
        if not line.strip():
            break
        kernel = _kernel(line)
        if kernel is None:
            return None
        kernels.append(kernel)
    return tuple(kernels) or None


def _kernel(line: str) -> Kernel | None:
    match = KERNEL.fullmatch(line)
    if match is None:
        return None
    operands = [_operands(match[part]) for part in ("inputs", "constants", "outputs")]
    metadata = match["metadata"].strip(" \x1e\x1f\r")
    nodes = tuple(dict.fromkeys(NODE.findall(metadata)))
    if any(found is None for found in operands) or (metadata and not nodes):
        return None
    inputs, constants, outputs = (found or () for found in operands)
    return Kernel(match["name"], match["kind"], inputs, constants, outputs, nodes)


def _operands(text: str) -> tuple[Operand, ...] | None:
    """The tensors of one list; None if not all of it was understood."""
    found = tuple(
        Operand(m["name"], tuple(int(dim) for dim in m["dims"].split(",") if dim), m["dtype"])
        for m in TENSOR_TEXT.finditer(text)
    )
    return found if len(found) == text.count("Datatype: ") and bool(found) == bool(text) else None


def accounts(
    kernels: Iterable[Kernel] | None,
    nodes: Iterable[str],
    *,
    compute: Collection[str],
    elementwise: Mapping[str, ReadCodes] = MappingProxyType({}),
) -> dict[str, Account]:
    """What each of `nodes` runs in; "unknown" where no kernel names it, or the log was not read.

    `compute` are the nodes that multiply. A node of several kernels runs in the widest type among
    them. Generated kernels count only where nothing else does a node's work; whether one that
    reads int8 or fp8 multiplies in that cannot be seen. `elementwise` are the sums and products
    of elements that are quantized. They have no integer arithmetic: one runs in int8 where its own
    kernel takes the codes of all its inputs, as the tail of an int8 product or from memory, and in
    float where another kernel dequantized one of them and wrote the floats.
    """
    found: dict[str, list[Kernel]] = {}
    for kernel in kernels or ():
        if kernel.kind not in CONTROL:
            for node in kernel.nodes:
                found.setdefault(node, []).append(kernel)
    plain = {node: _account(found.get(node, []), node in compute) for node in nodes}
    products = {node: plain[node].precision for node in compute if node in plain}
    return {
        node: _of_elements(account, elementwise[node], found.get(node, []), products)
        if node in elementwise
        else account
        for node, account in plain.items()
    }


def _of_elements(
    account: Account,
    codes: ReadCodes,
    kernels: list[Kernel],
    products: Mapping[str, str],
) -> Account:
    """What an elementwise node runs in that reads `codes`; `account` is what it is without, and
    `products` what each product runs in."""
    touching = [kernel for kernel in kernels if codes.dequantizers & {*kernel.nodes}]
    for kernel in touching:
        held = {operand.precision for operand in (*kernel.inputs, *kernel.outputs)}
        tail = {products[name] for name in kernel.nodes if name in products}
        if not codes.dequantizers <= {*kernel.nodes} or codes.precision not in held | tail:
            return Account(account.precision, tuple(touching))
    return Account(codes.precision, tuple(touching)) if touching else account


def _account(kernels: list[Kernel], is_compute: bool) -> Account:
    mine = [kernel for kernel in kernels if kernel.kind != GENERATED] or kernels
    precisions = {_share(kernel, is_compute) for kernel in mine}
    widest = [name for name in WIDEST_FIRST if name in precisions]
    precision = widest[0] if widest and UNKNOWN not in precisions else UNKNOWN
    return Account(precision, tuple(mine))


def _share(kernel: Kernel, is_compute: bool) -> str:
    """What `kernel` does a node's work in: of a product, or of what is fused with one."""
    if kernel.kind != GENERATED:
        fused = kernel.kind in PRODUCT_LAYERS and not is_compute
        return UNKNOWN if fused and kernel.precision in QUANTIZED else kernel.precision
    read = {operand.precision for operand in (*kernel.inputs, *kernel.constants)}
    if not is_compute:
        return kernel.precision
    if read & {*QUANTIZED}:
        operands = (*kernel.inputs, *kernel.constants)
        matrices = {operand.precision for operand in operands if operand.is_matrix}
        fused = kernel.name.startswith(ATTENTION) and matrices in ({"int8"}, {"fp8"})
        return matrices.pop() if fused else UNKNOWN
    if kernel.name.startswith(COMPOSED) or len(read) != 1:
        return kernel.precision
    return read.pop()  # fused attention, whose products are of what it reads


def where(account: Account) -> str:
    """The kernels of an account in words, for messages.

    >>> where(Account("unknown"))
    'no kernel names it'
    """
    if not account.kernels:
        return "no kernel names it"
    kernel = account.kernels[0]
    types: Mapping[str, None] = dict.fromkeys(o.dtype for o in kernel.factors or kernel.inputs)
    return f"kernel {kernel.name} ({kernel.kind}) on {' and '.join(types) or 'unknown types'}"


def complaints(
    plan: PrecisionPlan,
    found: Mapping[str, Account],
    refused: Mapping[str, str],
    *,
    readable: bool = True,
) -> tuple[str, ...]:
    """A sentence for each node that does not run, or is not known to run, as planned.

    Those are the compute nodes, and the others that the user pinned. `refused` maps a node that
    was built without its Q/DQ to the words of the compiler.
    """
    if not readable:
        return (
            "precisions are unknown: the list of kernels in build.log is not that of "
            "TensorRT-RTX 1.7, which this version of trtune reads",
        )
    sentences = []
    for node, assignment in plan.nodes.items():
        pinned = assignment.role != SHAPE and assignment.is_pinned
        pinned = pinned and assignment.precision not in QUANTIZED  # that is its leader's alone
        if assignment.role != COMPUTE and not pinned:
            continue
        wanted, account = assignment.precision, found[node]
        words = not_honoured({node: wanted}, {node: account.precision})
        if node in refused:
            sentences.append(
                f"{node}: planned {wanted}, built without Q/DQ and runs in {account.precision}: "
                f"TensorRT-RTX says {refused[node]!r}"
            )
        elif words:
            sentences.append(f"{words[0]}: {where(account)}")
        elif account.precision == UNKNOWN and plan.is_quantized(node):
            sentences.append(
                f"{node}: planned {wanted}, what it runs in is unknown: {where(account)}"
            )
    return tuple(sentences)
