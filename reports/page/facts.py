"""The large numbers at the top of the page."""

from __future__ import annotations

from dataclasses import dataclass

from trtune.reports.record import PinCost, RunRecord, Variant
from trtune.reports.summary import (
    FRACTIONS,
    PRECISIONS,
    TIMES,
    change_text,
    decibels,
    find_variant,
    main_variant,
    metric_label,
    metric_text,
    plural,
    seconds_text,
    share_text,
    size_text,
    speedup,
)


@dataclass(frozen=True, slots=True)
class Fact:
    """One large number at the top of the page, what it is, and what to hold it against."""

    label: str
    value: str
    note: str = ""


def facts_of(record: RunRecord) -> list[Fact]:
    variant, metric = main_variant(record), record.baseline.metric
    if variant is None:
        return []
    facts = [_accuracy_fact(record, variant)]
    if metric != "sqnr_db" and variant.sqnr_db is not None:
        facts.append(Fact("SQNR of the outputs", decibels(variant.sqnr_db), "against FP32"))
    if variant.agreement is not None:
        text = metric_text("agreement", variant.agreement)
        facts.append(Fact("same answer as FP32", text, plural(record.baseline.samples, "sample")))
    total = sum(variant.nodes.values())
    low = next((p for p in PRECISIONS[:4] if variant.nodes.get(p)), None)
    if total and low:
        part = variant.nodes[low]
        note = f"{share_text(part, total)} of the weighted nodes"
        facts.append(Fact(f"layers in {low.upper()}", f"{part} of {total}", note))
    facts.append(Fact("pins", str(len(variant.pinned)), _pins_note(variant)))
    facts += _speed_fact(record, variant.name)
    return [*facts, *_size_fact(record, variant), *_calibration_fact(record)]


def costs_shown(record: RunRecord) -> list[PinCost]:
    """The pins of the main variant, those that cost speed first."""
    variant = main_variant(record)
    found = variant.pins if variant is not None else []
    return sorted(found, key=lambda pin: pin.precision == "fp8")


def _accuracy_fact(record: RunRecord, variant: Variant) -> Fact:
    metric = record.baseline.metric
    note = ""
    if record.baseline.value is not None:
        note = f"FP32 {metric_text(metric, record.baseline.value)}"
    if variant.drop is not None:
        unit = " points" if metric in FRACTIONS else ""
        note += f" ({change_text(metric, variant.drop)}{unit})"
    return Fact(metric_label(metric), metric_text(metric, variant.value), note.strip())


def _pins_note(variant: Variant) -> str:
    if variant.not_honoured:
        return f"{len(variant.not_honoured)} not honoured"
    return "every layer as planned" if not variant.pinned else "layers kept out of INT8"


def _speed_fact(record: RunRecord, name: str) -> list[Fact]:
    """The speed-up of the first variant called `name` whose speed means something."""
    for variant in record.variants:
        faster = speedup(record, variant) if variant.name == name else None
        if faster is not None and variant.latency_ms is not None:
            note = f"{variant.backend}, batch {variant.latency_ms.batch}"
            return [Fact("as fast as FP32", f"{faster:.2f}{TIMES}", note)]
    return []


def _size_fact(record: RunRecord, variant: Variant) -> list[Fact]:
    if variant.size_bytes is None:
        return []
    fp32 = find_variant(record, "fp32", variant.backend)
    known = fp32 is not None and fp32.size_bytes
    note = f"FP32 {size_text(fp32.size_bytes)}" if fp32 is not None and known else ""
    return [Fact("size of the model", size_text(variant.size_bytes), note)]


def _calibration_fact(record: RunRecord) -> list[Fact]:
    calibration = record.calibration
    if calibration is None:
        return []
    if not calibration.pictures:
        return [Fact("scales", str(calibration.tensors), f"from {calibration.method}")]
    note = f"{plural(calibration.pictures, 'picture')}, {calibration.method}"
    value = "reused" if calibration.reused else seconds_text(calibration.seconds)
    return [Fact("calibration", value, note)]
