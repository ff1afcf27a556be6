"""What the comparison of layers gave, and the table that is made of it."""

from __future__ import annotations

from collections.abc import Mapping

from trtune.precision.compare.inner import inner_kind
from trtune.precision.plan.plan import PrecisionPlan, is_lowered
from trtune.reports.entries.layers import Measured, rows_of
from trtune.reports.record import LayerRow
from trtune.run.backends import BackendFailed, watched
from trtune.run.stages.engines import engine_folder, engine_of, is_emulation
from trtune.run.stages.layers import Sums, accumulated, of_runtime
from trtune.run.work import RunWork, alone_of


def compared(work: RunWork) -> Measured:
    """The errors of the untuned plan's nodes; none if all of it is FP32."""
    setup, section = work.setup, work.setup.config.compare
    if not is_lowered(work.untuned):
        return Measured()
    stage = accumulated(
        work.candidate(work.untuned),
        work.subject.view,
        setup.evaluation,
        section,
        device=work.setup.device,
        progress=setup.progress,
    )
    errors = work.workspace.get(stage)
    alone = work.workspace.get(alone_of(work)) if section.alone else None
    return Measured(errors, alone or {})


def layer_rows(
    work: RunWork,
    plan: PrecisionPlan,
    times: Mapping[str, float] | None = None,
    accounts: Mapping[str, dict[str, str]] | None = None,
) -> list[LayerRow]:
    """One row a node, in graph order: what it is, what `plan` gives it, and its errors.

    `accounts` has what each node runs in by backend; without, what was built tells it.
    """
    found = compared(work)
    runtime, how = _of_runtime(work, plan)
    measured = Measured(
        found.accumulated,
        found.alone,
        runtime,
        how,
        runtime_account(work, plan) if accounts is None else accounts,
        times or {},
    )
    table = work.calibrated.table if work.untuned.quantized_nodes else None
    return rows_of(work.subject.view, plan, work.untuned, table, measured)


def _of_runtime(work: RunWork, plan: PrecisionPlan) -> tuple[Sums, str]:
    """Errors of the first engine that runs here against onnxruntime, and how they were read."""
    setup, candidate = work.setup, work.candidate(plan)
    for backend in work.runtimes.engines:
        try:
            with watched(backend):
                work.workspace.get(engine_of(candidate, backend, "", setup.progress))
                stage = of_runtime(
                    candidate,
                    work.subject.view,
                    backend,
                    engine_folder(work.folder, backend),
                    setup.evaluation,
                    setup.config.compare,
                    setup.progress,
                )
                return work.workspace.get(stage), f"{backend.name}, {inner_kind(backend)}"
        except BackendFailed as failure:
            work.runtimes.fail(failure)
    return {}, ""


def runtime_account(work: RunWork, plan: PrecisionPlan) -> dict[str, dict[str, str]]:
    """Backend -> node -> what it runs in, as the runtime that built `plan` tells it."""
    found = {}
    for backend in work.runtimes.alive:
        stage = engine_of(work.candidate(plan), backend, "", work.setup.progress)
        if not is_emulation(backend) and work.workspace.holds(stage):
            found[backend.name] = dict(work.workspace.get(stage).precisions)
    return found
