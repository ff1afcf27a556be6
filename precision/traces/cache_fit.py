"""Whether a calibration cache belongs to a model, and what speaks for and against it.

TensorRT takes a cache of another export without a word wherever names coincide. What tells a
foreign one: tensors that need a scale and have none, entries that nothing in the model explains,
entries for weights, equal scales in front of and behind convolutions, and ranges that cannot be
(a sigmoid that reaches 7).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from trtune.calibrate.cache import Cache
from trtune.precision.graph.view import GraphView
from trtune.precision.lower.deploy import clip_bounds
from trtune.precision.traces.parser_names import explain_tensor, is_parser_name

HALF, FEW = 0.5, 0.1
"""Shares: so much alone tells a foreign cache, and so much of two kinds together."""
OFTEN = 5
"""Equal scales mean something where they are so many times more frequent than by chance."""
BEYOND = 1.5
"""A range so many times above what an operator can give belongs to another tensor."""
BOUNDED = {"Sigmoid": 1.0, "HardSigmoid": 1.0, "Softmax": 1.0, "Tanh": 1.0, "Erf": 1.0}
SHOWN = 3


@dataclass(frozen=True, slots=True)
class CacheFit:
    """What speaks against a cache belonging to a model, and the verdict.

    `missing` of `needed` tensors have no entry; `left_over` of `entries` (less those that the
    parser made up) name nothing in the model; `weights` have an entry though TensorRT takes their
    scales from the values; `equal` are convolutions with the same scale in front and behind, of
    `convolutions` with both, where `chance` is how often two entries of this cache coincide;
    `impossible` are ranges that an operator cannot give.
    """

    needed: int
    missing: tuple[str, ...]
    entries: int
    left_over: tuple[str, ...]
    weights: tuple[str, ...] = ()
    equal: tuple[str, ...] = ()
    convolutions: int = 0
    chance: float = 0.0
    impossible: tuple[str, ...] = ()

    @property
    def against(self) -> tuple[str, ...]:
        """The reasons for which the cache is foreign; empty if it belongs to the model."""
        return tuple(_against(self))

    @property
    def belongs(self) -> bool:
        """Whether the cache can be taken for one of this model."""
        return not self.against

    def __str__(self) -> str:
        if self.against:
            return f"the cache does not belong to this model: {'; '.join(self.against)}"
        return (
            f"the cache belongs to this model: {self.needed - len(self.missing)} of {self.needed} "
            f"tensors that need a scale have an entry, and {len(self.left_over)} of {self.entries} "
            "entries name nothing in it"
        )


def _against(fit: CacheFit) -> Iterator[str]:
    missing = len(fit.missing) / max(fit.needed, 1)
    strange = len(fit.left_over) / max(fit.entries, 1)
    told = (
        f"{len(fit.missing)} of {fit.needed} tensors that need a scale have no entry"
        f"{_such(fit.missing)}"
    )
    names = (
        f"{len(fit.left_over)} of {fit.entries} entries name nothing in it{_such(fit.left_over)}"
    )
    several = min(len(fit.missing), len(fit.left_over)) > 1
    together = several and missing > FEW and strange > FEW
    if missing > HALF or together:
        yield told
    if strange > HALF or together:
        yield names
    if fit.weights:
        yield f"{len(fit.weights)} entries are for weights, which need none{_such(fit.weights)}"
    share = len(fit.equal) / max(fit.convolutions, 1)
    if len(fit.equal) > 1 and share > max(FEW, OFTEN * fit.chance):
        yield (
            f"{len(fit.equal)} of {fit.convolutions} convolutions have the same scale in front and "
            f"behind{_such(fit.equal)}"
        )
    if fit.impossible:
        yield f"ranges that cannot be: {', '.join(fit.impossible[:SHOWN])}"


def _such(names: Collection[str]) -> str:
    return f" (such as {next(iter(names))!r})" if names else ""


def fit_of(
    view: GraphView, needed: Collection[str], cache: Cache, *, also_known: Collection[str] = ()
) -> CacheFit:
    """How `cache` fits the model of `view`, whose tensors `needed` need a scale.

    `also_known` are tensors of the file that normalising folded away.
    """
    entries = set(cache.names)
    known = {*view.graph_inputs, *view.producer, *view.initializers, *also_known}
    own = [name for name in cache.names if not is_parser_name(name)]
    left = [n for n in own if n not in known and not explain_tensor(n, view)]
    equal, both = _equal_over_convolutions(view, cache)
    return CacheFit(
        needed=len(needed),
        missing=tuple(tensor for tensor in needed if tensor not in entries),
        entries=len(own),
        left_over=tuple(left),
        weights=tuple(name for name in own if _is_weight(view, name)),
        equal=equal,
        convolutions=both,
        chance=_chance(cache),
        impossible=tuple(_impossible(view, cache)),
    )


def _is_weight(view: GraphView, name: str) -> bool:
    if name not in view.initializers or len(view.initializers[name].dims) < 2:
        return False
    readers = view.consumers.get(name, ())
    weighted = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    return bool(readers) and all(
        index == 1 and view.by_name[node].op_type in weighted for node, index in readers
    )


def _equal_over_convolutions(view: GraphView, cache: Cache) -> tuple[tuple[str, ...], int]:
    equal, both = [], 0
    for node in view.nodes:
        if node.op_type not in ("Conv", "ConvTranspose"):
            continue
        scales = [cache.scales.get(name) for name in (node.input[0], node.output[0])]
        if None not in scales:
            both += 1
            if scales[0] == scales[1]:
                equal.append(node.name)
    return tuple(equal), both


def _chance(cache: Cache) -> float:
    """The probability that two entries drawn from the cache have the same scale."""
    amounts = Counter(cache.scales.values())
    total = sum(amounts.values())
    pairs = total * (total - 1)
    return sum(n * (n - 1) for n in amounts.values()) / pairs if pairs else 1.0


def _impossible(view: GraphView, cache: Cache) -> Iterator[str]:
    for node in view.nodes:
        output = node.output[0] if node.output else ""
        scale = cache.scales.get(output)
        bound = BOUNDED.get(node.op_type)
        if scale is None:
            continue
        if node.op_type == "Clip":
            low, high = clip_bounds(view, node)
            bound = None if low is None or high is None else max(abs(low), abs(high))
        if bound and 127 * scale > BEYOND * bound:
            yield f"{output!r} of a {node.op_type} reaches {127 * scale:.3g}"
