"""What running one node alone in half precision does to the output: the order to pin in."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trtune.configs.progress import Progress, silent
from trtune.datasets.batches import Batch
from trtune.precision.compare.alone import in_parallel
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.casts import insert_casts, needed_opset, raise_opset
from trtune.precision.lower.half_on_cpu import in_float32
from trtune.precision.plan.half_types import HALVES
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.runtime.output_groups import add_parts, output_groups, worst_output
from trtune.precision.runtime.session import kept_values, make_session


def half_nodes(plan: PrecisionPlan) -> tuple[str, ...]:
    """The compute nodes of `plan` that run in fp16 or bf16 and are not pinned, in graph order."""
    return tuple(
        name
        for name in plan.compute_nodes
        if plan.precision(name) in HALVES and not plan.nodes[name].is_pinned
    )


def half_alone_errors(
    model: Model,
    view: GraphView,
    plan: PrecisionPlan,
    pictures: Sequence[Batch],
    *,
    nodes: Sequence[str] | None = None,
    seconds: float = math.inf,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, ErrorSums]:
    """What running a half node of `plan` alone in half does, with what is fused behind it.

    Node -> errors of the output that suffers most, against FP32 over `pictures`, which are batches
    of a size that the model takes. One session and one pass over the pictures a node. `nodes` are
    those asked, in this order until `seconds` are over; `half_nodes` by default. The result is in
    graph order.
    """
    raised = raise_opset(model, needed_opset(view, plan))
    outputs = [output.name for output in model.outputs]
    session = make_session(model.proto, external_dir=model.external_dir, device=device)
    references = [kept_values(session, outputs, batch.feeds) for batch in pictures]
    groups = output_groups({name: [found[name] for found in references] for name in model.judged})

    def measure(name: str) -> ErrorSums:
        types = {n: plan.float_type(n) for n in (name, *plan.groups.get(name, ()))}
        typed = insert_casts(raised.proto, types, external_dir=model.external_dir)
        alone = make_session(
            in_float32(typed), threads=1, external_dir=model.external_dir, device=device
        )
        sums: dict[str, ErrorSums] = {}
        for batch, reference in zip(pictures, references, strict=True):
            found = dict(zip(outputs, alone.run(outputs, dict(batch.feeds)), strict=True))
            sums = add_parts(sums, groups, reference, found)
        return worst_output(sums)

    halves = half_nodes(plan)
    asked = list(halves if nodes is None else nodes)
    found = in_parallel(measure, asked, what="rank layers", seconds=seconds, progress=progress)
    errors = dict(zip(asked, found, strict=False))
    return {name: errors[name] for name in halves if name in errors}
