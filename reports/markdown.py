"""The report as Markdown: the tables of the HTML report, readable as plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from trtune.reports.record import CalibrationRecord, LayerRow, RunRecord, TuningStep
from trtune.reports.summary import (
    DASH,
    count,
    decibels,
    headline,
    main_variant,
    metric_label,
    metric_text,
    nodes_and_layers,
    number,
    outlier_sentences,
    plural,
    plus_minus,
    ratio_text,
    samples_text,
    seconds_text,
    verdict,
)
from trtune.reports.tables import (
    Table,
    compare_table,
    outputs_table,
    pinned_nodes,
    result_table,
    worst_layers,
)

WORST = 15


def report_markdown(record: RunRecord, layers: Sequence[LayerRow] = ()) -> str:
    """The whole report of one run. Parts for which nothing was measured are left out."""
    parts = [
        f"# {escape(record.name)}",
        f"**{escape(headline(record))}**",
        escape(verdict(record)),
        escape(samples_text(record)),
        table_markdown(result_table(record)),
        *_section("Outputs", _outputs(record)),
        *_section("Not honoured", _not_honoured(record)),
        *_section("Engines", _engines(record)),
        *_section("Notes", [f"- {escape(note)}" for note in record.notes]),
        *_section("Pins", _pins(record)),
        *_section("Tuning", _tuning(record)),
        *_section("Error per layer", _errors(record, layers)),
        *_section("Calibration", _calibration(record.calibration, record)),
        *_section("Every node", _layers(record, layers)),
        *_section("Reproduce", _reproduce(record)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def several_markdown(records: Sequence[RunRecord]) -> str:
    """Several runs side by side."""
    return f"# {plural(len(records), 'run')}\n\n{table_markdown(compare_table(records))}\n"


def escape(text: str) -> str:
    r"""`text` so that Markdown shows it as it is, on one line, inside and outside tables.

    >>> print(escape("a|b *c* <d>"))
    a\|b \*c\* &lt;d>
    """
    flat = re.sub(r"\s+", " ", text).strip()
    flat = flat.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", flat)


def code(text: str) -> str:
    """`text` as a code span that survives backticks and, in a table, pipes.

    >>> print(code("/model.0/Conv"))
    `/model.0/Conv`
    """
    flat = re.sub(r"\s+", " ", text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", flat)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{flat}{space}{fence}" if flat else ""


def table_markdown(table: Table) -> str:
    """A table in pipes, numbers to the right, footnotes below."""
    body = _pipes(
        table.columns,
        [[escape(cell) for cell in row] for row in table.rows],
        text_columns=table.text_columns,
    )
    notes = zip(table.marks, table.footnotes, strict=True)
    return "\n\n".join([body, *(f"{mark} {escape(note)}" for mark, note in notes)])


def _pipes(columns: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int) -> str:
    rules = ["---" if i < text_columns else "---:" for i in range(len(columns))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rules, *rows))


def _section(title: str, blocks: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(blocks)] if blocks else []


def _outputs(record: RunRecord) -> list[str]:
    table = outputs_table(record)
    return [table_markdown(table)] if table else []


def _not_honoured(record: RunRecord) -> list[str]:
    return [
        f"- {escape(v.name)} on {escape(v.backend)}: {', '.join(map(code, v.not_honoured))}"
        for v in record.variants
        if v.not_honoured
    ]


def _engines(record: RunRecord) -> list[str]:
    """The command that builds each engine with NVIDIA's own tool, and what its backend says."""
    lines = []
    for v in record.variants:
        if v.command or v.notes or v.engines:
            what = code(v.command or str(v.path))
            lines.append(f"- {escape(v.name)} on {escape(v.backend)}: {what}")
            lines += [f"  - {escape(note)}" for note in v.notes]
            lines += [f"  - for {escape(gpu)}: {code(path)}" for gpu, path in v.engines.items()]
    return lines


def _tuning(record: RunRecord) -> list[str]:
    if not record.tuning:
        return []
    metric = record.baseline.metric
    rows = [
        [
            str(step.step),
            step.action,
            _step_pins(step),
            "yes" if step.met else "no",
            str(len(step.pinned)),
            metric_text(metric, step.value) + plus_minus(metric, step.error),
            plural(step.samples, "picture") + ("" if step.whole else ", then ended"),
            "cached" if step.cached else seconds_text(step.seconds),
        ]
        for step in record.tuning
    ]
    front = ", ".join(
        f"{plural(p.pins, 'pin')} {metric_text(metric, p.value)}" for p in record.front
    )
    columns = ("step", "action", "pinned", "target met", "pins", metric_label(metric),
               "measured on", "time")  # fmt: skip
    best = ["", f"Best with so many pins: {front}."] if len(record.front) > 1 else []
    return [_pipes(columns, rows, text_columns=4), *best]


def _step_pins(step: TuningStep) -> str:
    """What a step pinned, and how many nodes are in fp8 by then."""
    moved = [f"{plural(len(step.moved), 'node')} in fp8"] if step.moved else []
    return ", ".join([*moved, *map(code, step.pinned)]) or DASH


def _pins(record: RunRecord) -> list[str]:
    """What each pin of the main variant costs; FP8 in one line, since it costs nothing."""
    variant = main_variant(record)
    if variant is None or not variant.pins:
        return []
    free = [pin for pin in variant.pins if pin.precision == "fp8"]
    rows = [
        [code(p.node), p.precision, p.origin, f"{100 * p.part:.1f} %", p.cost]
        for p in variant.pins
        if p.precision != "fp8"
    ]
    columns = ("node", "precision", "by", "of the multiplications", "cost in speed")
    lines = [_pipes(columns, rows, text_columns=3)] if rows else []
    if free:
        share = 100 * sum(pin.part for pin in free)
        names = ", ".join(code(pin.node) for pin in free)
        lines += ["", f"{plural(len(free), 'node')} ({share:.1f} % of the multiplications) in FP8, "
                      f"at no cost in speed: {names}."]  # fmt: skip
    return lines


def _errors(record: RunRecord, layers: Sequence[LayerRow]) -> list[str]:
    pinned = pinned_nodes(record, layers)
    blocks = []
    for by, title in (
        ("alone_sqnr_db", "**Alone**: only this node quantized; error of the network's output."),
        ("accumulated_sqnr_db", "**Accumulated**: whole network quantized; error of this output."),
    ):
        worst = worst_layers(layers, by=by, count=WORST)
        rows = [
            [code(r.node), r.op, "pinned" if r.node in pinned else "", decibels(getattr(r, by))]
            for r in worst
        ]
        if rows:
            blocks += [title, "", _pipes(("node", "op", "", "SQNR"), rows, text_columns=3), ""]
    return blocks[:-1]


def _calibration(calibration: CalibrationRecord | None, record: RunRecord) -> list[str]:
    if calibration is not None and not calibration.pictures:
        return [f"{plural(calibration.tensors, 'scale')} from {escape(calibration.method)}."]
    if calibration is None:
        return []
    lines = [
        f"{plural(calibration.pictures, 'picture')}, {plural(calibration.tensors, 'tensor')}, "
        f"method {escape(calibration.method)}, {seconds_text(calibration.seconds)} "
        f"({seconds_text(calibration.inference_seconds)} of it inference)."
    ]
    if calibration.skipped:
        names = ", ".join(map(code, calibration.skipped[:10]))
        lines += ["", f"{plural(len(calibration.skipped), 'picture')} skipped: {names}"]
    sentences = [f"- {escape(sentence)}" for sentence in outlier_sentences(record)]
    lines += ["", *sentences] if sentences else []
    rows = [
        [code(o.tensor), code(o.item), *map(number, (o.max, o.runner_up, o.median_max)),
         ratio_text(o.ratio)]
        for o in calibration.outliers[:WORST]
    ]  # fmt: skip
    if rows:
        columns = ("tensor", "picture", "max", "next", "median", "max / median")
        lines += ["", _pipes(columns, rows, text_columns=2)]
    return lines


def _layers(record: RunRecord, layers: Sequence[LayerRow]) -> list[str]:
    if not layers:
        return []
    rows = [
        [code(r.node), r.op, r.precision, r.runs_in, escape(r.reason), count(r.macs),
         count(r.parameters), number(r.amax), decibels(r.alone_sqnr_db),
         decibels(r.accumulated_sqnr_db)]
        for r in layers
    ]  # fmt: skip
    columns = ("node", "op", "precision", "runs in", "reason", "MACs", "parameters", "amax",
               "alone", "accumulated")  # fmt: skip
    summary = f"<details><summary>{nodes_and_layers(record, len(layers))}</summary>"
    return [summary, "", _pipes(columns, rows, text_columns=5), "", "</details>"]


def _reproduce(record: RunRecord) -> list[str]:
    commands = [*filter(None, [record.command]), *record.polygraphy]
    lines = ["```sh", *commands, "```", ""] if commands else []
    facts = {**record.versions, **record.hashes}
    return lines + [f"- {escape(name)}: {code(value)}" for name, value in facts.items()]
