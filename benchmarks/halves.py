#!/usr/bin/env python3
"""A detector's AP on all 128 pictures, each measured by a network that was not calibrated on it.

    python benchmarks/halves.py                             INT8 as it is by default, no pins
    python benchmarks/halves.py none predict=fp8 all=fp8    and with some of its layers in another

The first network is calibrated and prepared on pictures 65 to 128 and measured on 1 to 64, the
second the other way round; the detections of both together give one AP, and its paired standard
error to FP32. One half alone has twice the error variance, and FP32 itself may be lucky on it.
`predict` are the convolutions that give objectness, boxes and classes; `first` and `last` are
halves of the network. `--set KEY=VALUE` goes to both, `--folder` keeps what they were made of for
another time. The data is found as in `accuracy.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from yardsticks import CONFIG, average_precision, value

from trtune.configs.load import load_config
from trtune.configs.progress import silent
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.plan import TUNER, PrecisionPlan
from trtune.precision.runtime.session import OrtEngine, make_session
from trtune.reports.outputs import Run
from trtune.run.work import RunWork, Setup
from trtune.run.workspace import Workspace

HALF = 64
COLUMNS = (1, 4, 80)
"""Channels of the convolutions that predict: objectness, boxes, classes."""
LADDER = "precision.ladder=[int8, fp8, fp16, fp32]"


def opened(
    folder: Path, asked: Sequence[str], *, calibrate: int, measure: tuple[int, int]
) -> RunWork:
    """The detector calibrated on `HALF` pictures from number `calibrate` on; `measure` is the first
    picture to evaluate and how many."""
    skip, take = measure
    data = f"data.evaluation={{skip: {skip}, take: {take}}}"
    config = load_config(
        CONFIG, overrides=[f"data.calibration.skip={calibrate}", data, LADDER, *asked]
    )
    folder.mkdir(parents=True, exist_ok=True)
    return RunWork(Setup.of(config, silent), Workspace(folder))


def named_nodes(work: RunWork, which: str) -> list[str]:
    """The quantized nodes that are called `which`: all, first, last or predict."""
    nodes = list(work.untuned.int8_nodes)
    if which in ("first", "last"):
        half = len(nodes) // 2
        return nodes[:half] if which == "first" else nodes[half:]
    if which == "all":
        return nodes
    if which != "predict":
        raise SystemExit(f"{which!r} is none of none, all, first, last, predict")
    view = work.subject.view
    shapes = {name: view.constant(view.by_name[name].input[1]).shape for name in nodes}
    return [n for n, s in shapes.items() if s[0] in COLUMNS and s[2:] == (1, 1)]


def planned(work: RunWork, case: str) -> PrecisionPlan:
    """The plan of `none`, or of `WHICH=PRECISION`."""
    if case == "none":
        return work.untuned
    which, _, precision = case.partition("=")
    return work.untuned.pin(named_nodes(work, which), precision, "", origin=TUNER)


@contextmanager
def both(works: Sequence[RunWork], plans: Sequence[PrecisionPlan]) -> Iterator[Run]:
    """Inference whose first `HALF` pictures run through the first network, the others through the
    second; they come one at a time and in order."""
    with ExitStack() as stack:
        engines = []
        for work, plan in zip(works, plans, strict=True):
            proto = lower_emulate(work.model_for(plan), plan, work.calibrated.table)
            engines.append(stack.enter_context(OrtEngine(partial(make_session, proto))))
        seen = 0

        def infer(feeds: Mapping[str, Any]) -> dict[str, Any]:
            nonlocal seen
            seen += 1
            return engines[seen > HALF].infer(feeds)

        yield infer
        if seen != 2 * HALF:
            raise SystemExit(f"{seen} pictures ran one by one, not {2 * HALF}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=["none"], metavar="WHICH=PRECISION")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--folder", type=Path)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = told.folder or Path(temporary)
        works = [
            opened(folder / "first", told.overrides, calibrate=HALF, measure=(0, HALF)),
            opened(folder / "second", told.overrides, calibrate=0, measure=(HALF, HALF)),
        ]
        bench = opened(folder / "all", told.overrides, calibrate=0, measure=(0, 2 * HALF))
        for case in ["all=fp32", *told.cases]:
            plans = [planned(work, case) for work in works]
            with both(works, plans) as infer:
                whole = average_precision(bench, infer)
            halves = ", ".join(value(work, plan) for work, plan in zip(works, plans, strict=True))
            print(f"{case}: AP {whole} (halves {halves})", flush=True)


if __name__ == "__main__":
    main()
