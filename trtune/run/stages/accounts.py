"""What rewrites that stay as nodes cost in a compiler, by its own account.

Engines without any rewrite and with all of them are built, each in a process of its own. Rewrites
that take a node out of INT8, or add a kernel, are named, so that the model is prepared again
without them before anything is tuned or measured on it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtune.configs.errors import TrtuneError
from trtune.configs.progress import Progress
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.runtime.api import Candidate
from trtune.precision.tune.prepared import MoveCosts, Ready
from trtune.run.stage import Stage, as_json

if TYPE_CHECKING:
    from trtune.precision.backends.rtx.backend import RtxBackend
    from trtune.precision.backends.rtx.moves import Listed

MOST_ACCOUNTS = 3
"""Times that engines with rewrites are built, at most; then all that stay as nodes are dropped."""


def move_costs(
    preparation: Stage[Ready],
    planned: PrecisionPlan,
    backend: RtxBackend,
    weigh: Callable[[], MoveCosts],
) -> Stage[MoveCosts]:
    """What `weigh` finds of the rewrites that `preparation` makes, for engines of `backend` whose
    nodes are `planned` so."""
    needs = {
        **preparation.needs,
        "plan": planned,
        "backend": backend.name,
        "settings": dict(backend.settings),
        **backend.versions,
    }
    return Stage("move-costs", needs, lambda folder: weigh(), as_json(_dump, _load))


def weighed(
    prepared: Callable[[Mapping[str, str]], Ready],
    without: Candidate,
    candidate: Callable[[Ready], Candidate],
    backend: RtxBackend,
    progress: Progress,
) -> MoveCosts:
    """The rewrites that cost something in engines of `backend`, against those of the model
    `without` any: all are looked at together, those that are to blame dropped, and the rest looked
    at again.

    `prepared` gives the model prepared without those of some tensors, `candidate` what is built.
    """
    dropped: dict[str, str] = {}
    before: Listed | None = None
    for number in range(MOST_ACCOUNTS + 1):
        ready = prepared(dropped)
        stay = {entry.tensor: entry.name for entry in ready.prepared.moved if not entry.folded}
        if not stay:
            return MoveCosts(dropped)
        if number == MOST_ACCOUNTS:
            break
        try:
            progress(f"moves in {backend.name}", 2 * number, 2 * MOST_ACCOUNTS)
            before = before or _listed(without, backend)
        except TrtuneError as error:
            return MoveCosts(unknown=f"the model as it was is not built: {error}")
        progress(f"moves in {backend.name}", 2 * number + 1, 2 * MOST_ACCOUNTS)
        found = _costs(before, without, candidate(ready), stay, backend)
        if not found.dropped:
            progress(f"moves in {backend.name}", 2 * MOST_ACCOUNTS, 2 * MOST_ACCOUNTS)
            return replace(found, dropped=dropped)
        dropped |= found.dropped
    return MoveCosts(dropped | dict.fromkeys(stay, "others were dropped, which was not enough"))


def _costs(
    before: Listed,
    without: Candidate,
    prepared: Candidate,
    stay: Mapping[str, str],
    backend: RtxBackend,
) -> MoveCosts:
    from trtune.precision.backends.rtx.moves import around_moves, costly_moves

    try:
        after = _listed(prepared, backend)
    except TrtuneError as error:
        return MoveCosts(dict.fromkeys(stay, f"no engine is built with it: {error}"))
    known = [node.name for node in GraphView.of(without.model).nodes]
    around = around_moves(GraphView.of(prepared.model), known, stay)
    costly = costly_moves(before, after, prepared.plan.int8_nodes, around, known)
    return MoveCosts(costly, (len(before.kernels), len(after.kernels)))


def _listed(candidate: Candidate, backend: RtxBackend) -> Listed:
    from trtune.precision.backends.rtx.moves import kernel_list

    with tempfile.TemporaryDirectory() as folder:
        return kernel_list(candidate, backend, Path(folder))


def _dump(costs: MoveCosts) -> dict[str, Any]:
    kernels = list(costs.kernels)
    return {"dropped": dict(costs.dropped), "kernels": kernels, "unknown": costs.unknown}


def _load(value: Any) -> MoveCosts:
    before, after = value["kernels"]
    return MoveCosts(dict(value["dropped"]), (int(before), int(after)), str(value["unknown"]))
