"""Placements with fewer layers in INT8 that may be faster on this CPU, tried beside each other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from trtune.configs.progress import Progress
from trtune.configs.schema import Latency as Section
from trtune.precision.backends.ort.backend import OnnxruntimeBackend
from trtune.precision.backends.ort.paying import slower_in_integers
from trtune.precision.backends.ort.profile import conversion_seconds, owners_in, profiled_times
from trtune.precision.graph.view import GraphView
from trtune.precision.plan.plan import TIMED, PrecisionPlan
from trtune.precision.runtime.api import BuildInfo, Candidate
from trtune.precision.runtime.session import OrtEngine
from trtune.reports.latency import Turns
from trtune.reports.record import Latency, Speedup
from trtune.run.data import RunData
from trtune.run.speed.choice import INTEGER_MODEL, PARTLY_MODEL, Deployment, decided
from trtune.run.speed.latency import take_turns, timed_batch, timing_needs
from trtune.run.stage import Stage, as_json
from trtune.run.stages.engines import FP32, TUNED, UNTUNED, engine_needs, label
from trtune.run.stages.measuring import session_of

if TYPE_CHECKING:
    from trtune.run.subject import Subject

CROSSINGS = (2.0, 4.0)
"""How many times a bare conversion what goes from INT8 to float and back is taken to cost: layouts
change there too, and nothing is fused across. Each gives a placement; the clock decides."""

INTEGERS = frozenset({"int8", "uint8"})

DEPLOYMENT = as_json(
    lambda found: {
        "model": found.model,
        "floats": list(found.floats),
        "speedups": {name: speedup.model_dump() for name, speedup in found.speedups.items()},
        "latency": {name: latency.model_dump() for name, latency in found.latency.items()},
    },
    lambda value: Deployment(
        value["model"],
        tuple(value["floats"]),
        {name: Speedup(**found) for name, found in value["speedups"].items()},
        {name: Latency(**found) for name, found in value["latency"].items()},
    ),
)


def faster_in_float(plan: PrecisionPlan, nodes: tuple[str, ...]) -> PrecisionPlan:
    """`plan` with the INT8 nodes among `nodes` in float, because that is faster."""
    return plan.without_int8(
        {node: "on this CPU it takes longer in INT8" for node in nodes if plan.is_int8(node)},
        origin=TIMED,
    )


def placing(
    subject: Subject,
    backend: OnnxruntimeBackend,
    candidates: Mapping[str, Candidate],
    view: GraphView,
    candidate: Callable[[PrecisionPlan], Candidate],
    built: Callable[[], Mapping[str, BuildInfo]],
    data: RunData,
    section: Section,
    progress: Progress,
) -> Stage[Deployment]:
    """Which model to deploy where the quantized one is not plainly faster than FP32.

    `candidates` are the untuned and the tuned model, both of `view`, and `built` gives their
    engines; `candidate` is what is built for a plan. Placements that measured times of nodes speak
    for are built and take turns with both, and with FP32.
    """

    tuned = candidates[TUNED]

    def make(folder: Path) -> Deployment:
        size, feeds = timed_batch(subject, data, section)
        infos = built()
        whole, untuned = infos[TUNED].path, infos[UNTUNED].path
        assert whole is not None
        assert untuned is not None
        tried = cheaper_placements(tuned, view, backend, infos[TUNED], feeds, batch=size)
        with tempfile.TemporaryDirectory(prefix="trtune-") as scratch, ExitStack() as stack:
            session = session_of(subject.model, threads=backend.threads)
            engines = {FP32: stack.enter_context(OrtEngine(session))}
            engines[INTEGER_MODEL] = stack.enter_context(backend.load(whole.parent))
            if untuned != whole:
                engines[UNTUNED] = stack.enter_context(backend.load(untuned.parent))
            for name, floats in tried.items():
                place = Path(scratch) / name
                backend.build(candidate(faster_in_float(tuned.plan, floats)), place)
                engines[name] = stack.enter_context(backend.load(place))
            turns: Turns = take_turns(engines, feeds, section, progress)
        return decided(turns, tried, batch=size)

    needs = timing_needs(backend, section)
    for name in (UNTUNED, TUNED):
        needs[f"engine {name}"] = engine_needs(candidates[name], backend)
    return Stage(f"placement-{label(backend)}", needs, make, DEPLOYMENT)


def cheaper_placements(
    tuned: Candidate,
    view: GraphView,
    backend: OnnxruntimeBackend,
    whole: BuildInfo,
    feeds: Mapping[str, NDArray[Any]],
    *,
    batch: int,
) -> dict[str, tuple[str, ...]]:
    """A name and the INT8 nodes that are to be float, for each placement worth a try; no two are
    the same, and none leaves nothing in INT8."""
    assert whole.path is not None
    names, threads = owners_in(tuned.model.proto.graph), backend.threads
    integer = profiled_times(whole.path, names, feeds, threads=threads, integer_kernels=True)
    exact = profiled_times(
        tuned.model.proto, names, feeds, threads=threads, external_dir=tuned.model.external_dir
    )
    free = {node for node, runs in whole.precisions.items() if runs in INTEGERS}
    into, out_of = conversion_seconds(threads)
    sets = []
    for factor in CROSSINGS:
        slower = slower_in_integers(
            view, free, integer, exact, (into * factor, out_of * factor), batch=batch
        )
        floats = tuple(node for node in slower if tuned.plan.is_int8(node))
        if 0 < len(floats) < len(tuned.plan.int8_nodes) and floats not in sets:
            sets.append(floats)
    return {f"{PARTLY_MODEL} {number}": floats for number, floats in enumerate(sets, start=1)}
