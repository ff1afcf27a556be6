#!/usr/bin/env python3
"""Where accuracy is lost: weights alone and activations alone, as calibrated and prepared.

    python benchmarks/limits.py resnet20_cifar10 mobilenetv2_cifar10

SQNR in dB on the evaluation pictures of each config, by method auto: all that is quantized, its
weights alone (the nearest codes, and those rounded on the data), its activations alone, which is
what no rounding of weights can pass; then the same of the prepared model. `--json` prints a line
for each model, as `accuracy.py --limits` reads it. The data is found through TRTUNE_DATA, or beside
the checkout.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

import trtune
from trtune.datasets.batches import Batch, batch_size, rebatch
from trtune.datasets.open import open_section
from trtune.precision.compare.alone import fake_quantize_weights
from trtune.precision.graph.file import load_model
from trtune.precision.graph.view import GraphView, Model
from trtune.precision.lower.emulate import lower_emulate
from trtune.precision.plan.placement import without_zero_ranges
from trtune.precision.plan.plan import PrecisionPlan
from trtune.precision.plan.rules import make_plan, weight_axis
from trtune.precision.prepare.codes import with_codes
from trtune.precision.prepare.values import Codes
from trtune.precision.runtime.errors import ErrorSums
from trtune.precision.runtime.session import make_session
from trtune.precision.tune.moments import rounded_weights
from trtune.precision.tune.prepared import prepare_model
from trtune.precision.tune.scales import Calibrated, calibrate_model

HERE = Path(__file__).resolve().parent
MEMORY = 2 << 30


def with_float_weights(
    model: Model, plan: PrecisionPlan, lowered: onnx.ModelProto
) -> onnx.ModelProto:
    """`lowered` whose int8 nodes read their weights as `model` has them."""
    view = GraphView.of(model)
    held = {tensor.name for tensor in lowered.graph.initializer}
    for node in lowered.graph.node:
        if node.name in plan.int8_nodes and len(view.by_name[node.name].input) > 1:
            name = view.by_name[node.name].input[1]
            if name in view.initializers:
                node.input[1] = name
                if name not in held:
                    lowered.graph.initializer.append(view.initializers[name])
                    held.add(name)
    return lowered


def with_nearest_codes(model: Model, plan: PrecisionPlan) -> onnx.ModelProto:
    """`model` whose int8 nodes read weights that are quantized to the nearest codes."""
    view = GraphView.of(model)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name in plan.int8_nodes:
        node = view.by_name[name]
        if len(node.input) > 1 and node.input[1] in view.initializers:
            exact = view.constant(node.input[1]).astype(np.float32)
            codes = fake_quantize_weights(exact, weight_axis(node)).astype(np.float32)
            held[node.input[1]].CopyFrom(numpy_helper.from_array(codes, node.input[1]))
    return proto


def decibels(
    exact: Model, tests: Mapping[str, onnx.ModelProto], source: Iterable[Batch]
) -> dict[str, float]:
    """The SQNR of each model's first output against `exact`."""
    name = exact.outputs[0].name
    sessions = {label: make_session(proto) for label, proto in tests.items()}
    reference = make_session(exact.proto)
    sums = dict.fromkeys(tests, ErrorSums())
    for batch in rebatch(source, batch_size(exact.inputs, 16)):
        (expected,) = reference.run([name], dict(batch.feeds))
        for label, session in sessions.items():
            (got,) = session.run([name], dict(batch.feeds))
            sums[label] = sums[label].add(expected, got)
    return {label: round(found.sqnr_db, 2) for label, found in sums.items()}


def parts_of(
    model: Model, plan: PrecisionPlan, calibrated: Calibrated, codes: Mapping[str, Codes]
) -> dict[str, onnx.ModelProto]:
    table = calibrated.table
    coded = with_codes(model, plan, codes)
    return {
        "all, nearest codes": lower_emulate(model, plan, table),
        "all, rounded": lower_emulate(coded, plan, table),
        "weights alone, nearest": with_nearest_codes(model, plan),
        "weights alone, rounded": coded.proto,
        "activations alone": with_float_weights(model, plan, lower_emulate(model, plan, table)),
    }


def limits(name: str) -> dict[str, dict[str, float]]:
    """What is lost where, as calibrated (auto) and as prepared, if any tensor was moved."""
    config = trtune.load_config(HERE / "configs" / f"{name}.yaml")
    assert config.data is not None
    model = load_model(Path(config.model.path))
    view = GraphView.of(model)
    calibration = open_section(config.data.calibration, model.inputs)
    evaluation = open_section(config.data.evaluation, model.inputs)
    base = calibrate_model(model, view, make_plan(view), calibration)
    plan = without_zero_ranges(view, make_plan(view), base.table)
    codes = rounded_weights(model, plan, base.table, calibration, memory=MEMORY)
    found = {"auto": decibels(model, parts_of(model, plan, base, codes), evaluation)}
    ready = prepare_model(model, view, make_plan(view), calibration, base)
    prepared = ready.prepared
    if prepared.moved:
        new = GraphView.of(prepared.model)
        plan = without_zero_ranges(new, ready.plan, ready.calibrated.table)
        parts = parts_of(prepared.model, plan, ready.calibrated, prepared.codes)
        found[f"{len(prepared.moved)} tensors moved"] = decibels(model, parts, evaluation)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", help="names of configs in benchmarks/configs")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each model")
    told = parser.parse_args()
    for name in told.configs:
        started = time.perf_counter()
        found = limits(name)
        if told.json:
            print(json.dumps({"model": name, "limits": found}), flush=True)
            continue
        for case, values in found.items():
            print(f"{name}, {case}: {', '.join(f'{k} {v:.2f}' for k, v in values.items())}")
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
