"""What a run amounts to, in words: numbers with their units, the target, the headline."""

from __future__ import annotations

import math

from trtune.reports.latency import is_open, turns_text
from trtune.reports.record import ORIGINAL, RunRecord, Variant

DASH = "—"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
FRACTIONS = (
    *("top1", "top5", "ap", "ap50", "miou", "next_token"),
    *("agreement", "detection_agreement", "pixel_agreement", "token_agreement"),
)
LESS_IS_BETTER = ("perplexity",)
LABELS = {
    "top1": "top-1",
    "top5": "top-5",
    "ap": "AP",
    "ap50": "AP50",
    "miou": "mIoU",
    "next_token": "next token",
    "detection_agreement": "agreement of detections",
    "pixel_agreement": "agreement of pixels",
    "token_agreement": "agreement of tokens",
    "agreement": "agreement",
    "sqnr_db": "SQNR",
    "cosine": "cosine",
}
PRECISIONS = ("int8", "fp8", "fp16", "bf16", "fp32")
STATUS = {"met": "target met", "missed": "target missed", "failed": "failed"}


def metric_label(metric: str) -> str:
    """How a metric is called in a report; a user's own by its function's name.

    >>> metric_label("top1"), metric_label("mine.metrics:mean_iou")
    ('top-1', 'mean_iou')
    """
    return LABELS.get(metric, metric.rpartition(":")[2])


def metric_text(metric: str, value: float | None) -> str:
    """A metric's value with its unit.

    >>> metric_text("top1", 0.8427), metric_text("sqnr_db", 17.24), metric_text("top1", None)
    ('84.27 %', '17.2 dB', '—')
    """
    if value is None:
        return DASH
    if metric in FRACTIONS:
        return f"{100 * value:.2f} %"
    if metric == "sqnr_db":
        return decibels(value)
    return f"{value:.5f}" if metric == "cosine" else number(value)


def change_text(metric: str, drop: float | None) -> str:
    """A drop as a signed change against FP32: points of a hundred for fractions.

    >>> change_text("top1", -0.001), change_text("top1", 0.0), change_text("top1", None)
    ('+0.10', '0.00', '—')
    """
    if drop is None:
        return DASH
    text = f"{-100 * drop:+.2f}" if metric in FRACTIONS else f"{-drop:+.4g}"
    return text[1:] if not text.strip("+-0.") else text.replace("-", MINUS)


def decibels(value: float | None) -> str:
    """Decibels with one decimal.

    >>> decibels(13.34), decibels(math.inf), decibels(None)
    ('13.3 dB', '∞ dB', '—')
    """
    if value is None:
        return DASH
    if math.isinf(value):
        return "∞ dB" if value > 0 else MINUS + "∞ dB"
    return f"{value:.1f} dB".replace("-", MINUS)


def number(value: float | None) -> str:
    """A bare number with four significant digits, all its digits from ten thousand on.

    >>> number(0.000123456), number(31.0), number(123456.7), number(None)
    ('0.0001235', '31', '123457', '—')
    """
    if value is None:
        return DASH
    plain = 1e4 <= abs(value) < 1e9
    return (f"{value:.0f}" if plain else f"{value:.4g}").replace("-", MINUS)


def three(value: float) -> str:
    """A positive number with three significant digits and its trailing zeros, never an exponent.

    >>> three(31.0), three(4.5), three(999.6), three(0.0123)
    ('31.0', '4.50', '1000', '0.0123')
    """
    if value < 1:
        return f"{value:.3g}"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def ratio_text(value: float) -> str:
    """How many times: whole from ten on.

    >>> ratio_text(4457.2), ratio_text(1.234)
    ('4457', '1.2')
    """
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def count(value: float) -> str:
    """A count with a decimal prefix.

    >>> count(0), count(999), count(53_120), count(3.1e9)
    ('0', '999', '53.1 k', '3.10 G')
    """
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{three(value / factor)} {prefix}"
    return f"{value:.0f}"


def size_text(size: int | None) -> str:
    """Bytes with a decimal prefix.

    >>> size_text(3_612_345), size_text(812), size_text(None)
    ('3.61 MB', '812 B', '—')
    """
    if size is None:
        return DASH
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{three(size / factor)} {unit}"
    return f"{size} B"


def seconds_text(seconds: float) -> str:
    """A duration.

    >>> seconds_text(0.412), seconds_text(75), seconds_text(3720)
    ('0.41 s', '1 min 15 s', '1 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def plural(amount: int, word: str) -> str:
    """`amount` and `word`, in the plural unless there is one.

    >>> plural(1, "pin"), plural(0, "pin"), plural(2, "pass")
    ('1 pin', '0 pins', '2 passes')
    """
    ending = "" if amount == 1 else "es" if word.endswith("s") else "s"
    return f"{amount} {word}{ending}"


def tail(name: str, *, length: int = 40) -> str:
    """The end of a long name, which tells nodes apart better than its start.

    >>> tail("/features/features.1/block/Conv", length=12), tail("conv_2")
    ('…/block/Conv', 'conv_2')
    """
    return name if len(name) <= length else "…" + name[1 - length :]


def target_value(record: RunRecord) -> float | None:
    """The value the metric must reach, or None without a target (or without a baseline)."""
    target = record.target or {}
    for bound in ("min", "max"):
        if target.get(bound) is not None:
            return float(target[bound])
    if target.get("max_drop") is not None and record.baseline.value is not None:
        sign = -1 if record.baseline.metric in LESS_IS_BETTER else 1
        return record.baseline.value - sign * float(target["max_drop"])
    return None


def target_text(record: RunRecord) -> str:
    """The target in words, or an empty string if there is none."""
    metric, needed = record.baseline.metric, target_value(record)
    if needed is None:
        return ""
    less = metric in LESS_IS_BETTER or (record.target or {}).get("max") is not None
    bound = "most" if less else "least"
    text = f"{metric_label(metric)} of at {bound} {metric_text(metric, needed)}"
    drop = (record.target or {}).get("max_drop")
    if drop is None:
        return text
    amount = f"{100 * float(drop):.4g} points" if metric in FRACTIONS else number(float(drop))
    return f"{text} (no more than {amount} {'above' if less else 'below'} FP32)"


def is_emulated(variant: Variant) -> bool:
    """Whether the variant emulates another runtime's arithmetic, so that its time means nothing."""
    return variant.backend.rpartition("/")[2] == "emulate"


def backends(record: RunRecord) -> list[str]:
    """The backends of the record in the order they first appear."""
    return list(dict.fromkeys(variant.backend for variant in record.variants))


def find_variant(record: RunRecord, name: str, backend: str | None = None) -> Variant | None:
    """The first variant called `name` (on `backend`, if given)."""
    for variant in record.variants:
        if variant.name == name and backend in (None, variant.backend):
            return variant
    return None


def untuned(record: RunRecord, backend: str | None = None) -> Variant | None:
    """The variant before tuning: the first with a value that is neither fp32 nor tuned."""
    for variant in record.variants:
        if variant.name in ("fp32", "tuned", ORIGINAL) or backend not in (None, variant.backend):
            continue
        if variant.value is not None:
            return variant
    return None


def main_variant(record: RunRecord) -> Variant | None:
    """What the run gives its user: the first `tuned` with a value, else the untuned variant."""
    for variant in record.variants:
        if variant.name == "tuned" and variant.value is not None:
            return variant
    return untuned(record)


def speedup(record: RunRecord, variant: Variant) -> float | None:
    """How many times faster than the `fp32` variant of the same backend and batch.

    None for FP32 itself, without two latencies to compare, and for an emulating backend.
    """
    fp32 = find_variant(record, "fp32", variant.backend)
    if fp32 is None or variant is fp32 or is_emulated(variant):
        return None
    ours, theirs = variant.latency_ms, fp32.latency_ms
    if ours is None or theirs is None or ours.batch != theirs.batch or not ours.median:
        return None
    return theirs.median / ours.median


def share_text(part: int, total: int) -> str:
    """A share in per cent that is 100 or 0 only where it is all or nothing.

    >>> share_text(321, 322), share_text(53, 53), share_text(1, 3000), share_text(2999, 3000)
    ('99.7 %', '100 %', '0.1 %', '99.9 %')
    """
    if part in (0, total):
        return "100 %" if part and total else "0 %"
    return f"{min(max(100 * part / total, 0.1), 99.9):.1f} %"


def nodes_text(variant: Variant) -> str:
    """'321 of 322 layers INT8 (99.7 %)', or an empty string if the variant does not say."""
    total = sum(variant.nodes.values())
    if not total:
        return ""
    low = next((p for p in PRECISIONS[:4] if variant.nodes.get(p)), None)
    if low is None:
        return f"all {plural(total, 'layer')} FP32"
    part = variant.nodes[low]
    share = "" if part == total else f" ({share_text(part, total)})"
    return f"{part} of {plural(total, 'layer')} {low.upper()}{share}"


def nodes_and_layers(record: RunRecord, nodes: int) -> str:
    """'53 layers and 47 other nodes': layers are weighted nodes, as everywhere.

    `nodes` are those of the table; where the record does not count the layers, '100 nodes'.
    """
    variant = main_variant(record)
    layers = sum(variant.nodes.values()) if variant else 0
    if not 0 < layers <= nodes:
        return plural(nodes, "node")
    others = nodes - layers
    return plural(layers, "layer") + (f" and {plural(others, 'other node')}" if others else "")


def headline(record: RunRecord) -> str:
    """One sentence: what came out, what it costs against FP32, and in how many layers."""
    variant, metric = main_variant(record), record.baseline.metric
    if variant is None:
        reasons = [v.reason for v in record.variants if v.reason]
        return f"No quantized model was measured: {reasons[0]}" if reasons else "Nothing measured."
    pins = plural(len(variant.pinned), "pin") if variant.pinned else "no pins"
    text = f"{_title(variant)} with {pins}: {metric_label(metric)} "
    text += metric_text(metric, variant.value)
    if record.baseline.value is not None:
        text += f" (FP32 {metric_text(metric, record.baseline.value)})"
    layers, faster = nodes_text(variant), speedup(record, variant)
    text += f", {layers}" if layers else ""
    text += f", {faster:.2f} times as fast as FP32" if faster else ""
    return text + "."


def verdict(record: RunRecord) -> str:
    """What the target says about it, and what the model without pins reaches."""
    needed, parts = target_text(record), []
    if needed:
        state = {"met": "is met", "missed": "is missed", "failed": "was not reached"}
        parts.append(f"The target, {needed}, {state[record.status]}{_noise_text(record)}.")
    elif record.status == "failed":
        parts.append("The run failed.")
    parts += [*_apart(record), *_slower(record), *_partly(record), *_chosen_elsewhere(record)]
    plain, main, metric = untuned(record), main_variant(record), record.baseline.metric
    if plain is not None and main is not None and main is not plain and main.pinned:
        change = "" if plain.drop is None else f" ({change_text(metric, plain.drop)} points)"
        change = change if metric in FRACTIONS else change.replace(" points", "")
        value = metric_text(metric, plain.value)
        parts.append(f"Without pins {_title(plain)} reaches {value}{change}.")
    return " ".join(parts)


def judged_variants(record: RunRecord) -> list[Variant]:
    """What the run gives its user on each backend that has a verdict: tuned, or else untuned."""
    found = {}
    for variant in record.variants:
        if variant.verdict is not None and variant.name != ORIGINAL:
            found[variant.backend] = variant  # the tuned one comes last
    return list(found.values())


def verdict_text(variant: Variant) -> str:
    """The verdict of a variant, and whether its pictures could have said otherwise."""
    if variant.verdict is None:
        return DASH
    return f"{variant.verdict}, within noise" if variant.within_noise else variant.verdict


def interval_text(metric: str, variant: Variant) -> str:
    """The interval of a value with its unit, or an empty string.

    >>> interval_text("top1", Variant(name="int8", backend="b", value=0.84, interval=(0.83, 0.85)))
    '83.00 to 85.00 %'
    """
    if variant.interval is None:
        return ""
    low, high = (metric_text(metric, value) for value in variant.interval)
    unit = " " + high.rpartition(" ")[2] if " " in high else ""
    return f"{low.removesuffix(unit) if unit else low} to {high}"


def plus_minus(metric: str, error: float | None) -> str:
    """A standard error to stand behind its value: points of a hundred for fractions.

    >>> plus_minus("top1", 0.0041), plus_minus("sqnr_db", 0.12), plus_minus("top1", None)
    (' ±0.41', ' ±0.1', '')
    """
    if error is None or not math.isfinite(error):
        return ""
    if metric in FRACTIONS:
        return f" ±{100 * error:.2f}"
    return f" ±{error:.1f}" if metric == "sqnr_db" else f" ±{error:.2g}"


def exact_text(metric: str, value: float, other: float | None) -> str:
    """A value with its unit, with as many digits as tell it from `other`.

    >>> exact_text("sqnr_db", 20.46, 20.5), exact_text("sqnr_db", 17.2, 20.5)
    ('20.46 dB', '17.2 dB')
    """
    text = metric_text(metric, value)
    if other is None or value == other or text != metric_text(metric, other):
        return text
    if metric == "sqnr_db" and math.isfinite(value):
        return f"{value:.2f} dB" if f"{value:.2f}" != f"{other:.2f}" else f"{value:.4f} dB"
    return f"{100 * value:.4f} %" if metric in FRACTIONS else f"{value:.7g}"


def _noise_text(record: RunRecord) -> str:
    """That the verdict could be another on other pictures, in words."""
    close = [v for v in judged_variants(record) if v.within_noise]
    if not close or record.status == "failed":
        return ""
    metric = record.baseline.metric
    where = interval_text(metric, close[0])
    return (
        f", but within the noise of {plural(close[0].samples, 'picture')} "
        f"({where} with 95 % confidence{_on(close[0], record)})"
    )


def _on(variant: Variant, record: RunRecord) -> str:
    return f" on {variant.backend}" if len(judged_variants(record)) > 1 else ""


def _slower(record: RunRecord) -> list[str]:
    """A sentence on each backend on which the quantized model takes longer than FP32 does."""
    last = {v.backend: v for v in record.variants if v.name not in ("fp32", ORIGINAL)}
    found = []
    for backend, variant in last.items():
        faster, fp32 = speedup(record, variant), find_variant(record, "fp32", backend)
        if faster is None or fp32 is None:
            continue
        ours, theirs = (f"{v.latency_ms.median:.3g} ms" for v in (variant, fp32) if v.latency_ms)
        name, times = _title(variant), f"{ours} against {theirs} in FP32"
        shipped = variant.shipped
        if shipped is not None and shipped.model == "fp32":
            found.append(
                f"{name} does not pay on {backend} on this machine: {times}"
                f"{turns_text(shipped.speedups.get('quantized'))}. So the model to ship there is "
                f"FP32, in {shipped.path}; the quantized one is {variant.path}."
            )
        elif round(faster, 2) < 1 and is_open(shipped):
            found.append(
                f"{name} is no faster than FP32 on {backend} on this machine: {times}"
                f"{turns_text(shipped.speedups.get(shipped.model) if shipped else None)}."
            )
        elif round(faster, 2) < 1:
            found.append(
                f"{name} does not pay on {backend} on this machine: {times}, so the FP32 model is "
                "the one to ship there."
            )
    return found


def _partly(record: RunRecord) -> list[str]:
    """A sentence on each backend where layers are left in float because that is faster."""
    found = []
    for variant in record.variants:
        shipped = variant.shipped
        if shipped is not None and shipped.model == "partly":
            whole = shipped.speedups.get("quantized")
            all_in = (
                f"; all in INT8 it is {whole.median:.2f} times as fast as FP32" if whole else ""
            )
            are = "is" if len(shipped.floats) == 1 else "are"
            found.append(
                f"{plural(len(shipped.floats), 'layer')} {are} left in FP32 on {variant.backend}, "
                f"where INT8 takes longer on this machine{all_in}."
            )
    return found


def _apart(record: RunRecord) -> list[str]:
    """A sentence on each backend that misses the target while another meets it."""
    judged, metric = judged_variants(record), record.baseline.metric
    missed = [v for v in judged if v.verdict == "missed"]
    if not missed or len(missed) == len(judged):
        return []
    met = ", ".join(v.backend for v in judged if v.verdict == "met")
    needed = target_value(record)
    values = ", ".join(
        f"{v.backend} has {exact_text(metric, v.value, needed)}"
        for v in missed
        if v.value is not None
    )
    return [f"It is met on {met}; {values}."]


def samples_text(record: RunRecord) -> str:
    """How many pictures did what, and which output was scored; empty if nothing is known.

    >>> from trtune.reports.record import Baseline, Used
    >>> base = Baseline(metric="top1", value=0.8, samples=744, output="logits")
    >>> data = {"calibration": Used(used=256, of=1000), "evaluation": Used(used=744)}
    >>> samples_text(RunRecord(schema=1, name="a", key="k", status="met", baseline=base, data=data))
    "Calibrated on 256 of 1000 pictures, measured on 744 pictures; top-1 of output 'logits'."
    """
    verbs = {"calibration": "calibrated", "validation": "pins chosen", "evaluation": "measured"}
    parts = []
    for name, verb in verbs.items():
        if name in record.data:
            used = record.data[name]
            of = "" if used.of is None or used.of == used.used else f"of {used.of} "
            noun = "picture" if used.used == 1 and not of else "pictures"
            parts.append(f"{verb} on {used.used} {of}{noun}")
    if not parts:
        return ""
    text = ", ".join(parts)
    scored = record.baseline.output
    label = metric_label(record.baseline.metric)
    scored = f"; {label} of output {scored!r}" if scored and record.baseline.value else ""
    return f"{text[0].upper()}{text[1:]}{scored}."


def _chosen_elsewhere(record: RunRecord) -> list[str]:
    """A sentence on the pictures that pins were chosen on, where those are others."""
    chosen, metric = record.validation, record.baseline.metric
    if chosen is None:
        return []
    text = f"Pins were chosen on {plural(chosen.samples, 'picture')} of data.validation"
    value = exact_text(metric, chosen.value, chosen.threshold)
    asked = exact_text(metric, chosen.threshold or 0.0, chosen.value)
    state = "meets" if chosen.met else "misses"
    return [f"{text}, where the tuned model has {value} and {state} the {asked} asked for there."]


def outlier_sentences(record: RunRecord) -> list[str]:
    """One sentence for each picture that dominates many tensors.

    'picture 321 sets the range of 45 tensors, up to 4457 times the median (conv_2_out)'
    """
    if record.calibration is None:
        return []
    return [
        f"picture {d.item} sets the range of {plural(d.tensors, 'tensor')}, up to "
        f"{ratio_text(d.worst_ratio)} times the median ({d.worst_tensor})"
        for d in record.calibration.dominant
    ]


def _title(variant: Variant) -> str:
    """The precision in capitals: of the variant's name, or of most of its nodes if tuned."""
    if variant.name in PRECISIONS:
        return variant.name.upper()
    low = next((p for p in PRECISIONS[:4] if variant.nodes.get(p)), "int8")
    return low.upper() if variant.name == "tuned" else variant.name.upper()
