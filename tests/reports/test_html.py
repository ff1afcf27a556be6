from __future__ import annotations

import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trtune.reports.html import report_html, several_html
from trtune.reports.record import (
    Baseline,
    EngineFinding,
    LayerRow,
    RunRecord,
    TensorRange,
    Variant,
)

VOID = {"meta", "link", "input", "wbr", "br", "img", "path", "use", "rect"}
EVIL = '<script>alert("x")</script>&"\'/<b>'


class Page(HTMLParser):
    """Collects ids, attributes and text, and checks that elements close in order.

    What is inside a script is no text.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "action", "data", "srcset", "poster"):
                self.links.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def parse(html: str) -> Page:
    """The page; fails if it is not well nested, repeats an id, or asks for anything outside."""
    page = Page(html)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    for link in page.links:
        inside = link.startswith("#") and link[1:] in page.ids
        assert inside or link == "data:," or link.startswith("data:image/")
    return page


def test_one_file_with_every_part(record: RunRecord, layers: list[LayerRow]) -> None:
    page = parse(report_html(record, layers))
    assert {"results", "tuning", "errors", "calibration", "layers", "reproduce"} <= set(page.ids)
    assert page.tags.count("svg") == 2 + len(record.histograms)
    assert "84.85\N{NO-BREAK SPACE}% (FP32 85.15" in "".join(page.words)
    for sentence in (
        "Picture 321 sets the range of 45 tensors, up to 4457 times the median",
        "1 picture could not be read and was skipped: broken_17.png",
        "emulation of TensorRT arithmetic: its CPU time says nothing about speed",
        "Not honoured by tensorrt (int8)",
        record.command,
        record.notes[0],
        record.hashes["model"],
    ):
        assert sentence in page.text


def test_the_error_lists_are_worst_first(record: RunRecord, layers: list[LayerRow]) -> None:
    html = report_html(record, layers)
    alone, accumulated = html.index("Alone: which"), html.index("Accumulated: how")
    values = [
        float(part.split("<b>")[1].split(" dB")[0])
        for part in html[alone:accumulated].split('<span class="num">')[1:]
    ]
    assert values == sorted(values)
    assert values[0] == pytest.approx(11.9)
    assert html[alone:accumulated].count("badge pin") == 2


def test_every_name_is_escaped(record: RunRecord, layers: list[LayerRow]) -> None:
    update = {"name": EVIL, "notes": [EVIL], "command": EVIL, "versions": {EVIL: EVIL}}
    evil = record.model_copy(
        update={
            **update,
            "variants": [v.model_copy(update={"backend": EVIL}) for v in record.variants],
            "histograms": [record.histograms[0].model_copy(update={"tensor": EVIL})],
        }
    )
    row = layers[0].model_copy(update={"node": EVIL, "op": EVIL, "reason": EVIL, "precision": EVIL})
    page = parse(report_html(evil, [row]))
    assert page.tags.count("script") == 1
    assert "b" not in page.tags[page.tags.index("table") :][:50]
    assert page.text.count('alert("x")') >= 10


@pytest.mark.parametrize("status", ["met", "missed", "failed"])
def test_a_record_with_hardly_anything(status: str) -> None:
    record = RunRecord.model_validate(
        {
            "schema": 1,
            "name": "n",
            "key": "k",
            "status": status,
            "baseline": Baseline(metric="sqnr_db", value=None, samples=1),
            "variants": [Variant(name="int8", backend="tensorrt", value=None, reason="no GPU")],
        }
    )
    page = parse(report_html(record))
    assert page.tags.count("section") == 1
    assert "script" not in page.tags
    assert "No quantized model was measured: no GPU" in page.text


def test_layers_without_errors_have_no_empty_columns(record: RunRecord) -> None:
    row = LayerRow(
        node="n", op="Conv", shape="1", macs=1, parameters=1, precision="int8", reason="default"
    )
    html = report_html(record, [row])
    assert '<button type="button">accumulated</button>' not in html
    assert '<button type="button">MACs</button>' in html
    assert 'id="errors"' not in html


def test_broken_layers_are_shown_as_such(record: RunRecord, layers: list[LayerRow]) -> None:
    row = layers[0].model_copy(update={"alone_sqnr_db": float("-inf")})
    zero = record.histograms[0].model_copy(update={"max": 0.0, "amax": 0.0})
    page = parse(report_html(record.model_copy(update={"histograms": [zero]}), [row]))
    assert "NaN" in page.text
    assert "never above zero" in page.text


def test_several_runs_on_one_page(record: RunRecord) -> None:
    other = record.model_copy(update={"name": "another", "status": "missed"})
    page = parse(several_html([record, other]))
    assert "2 runs side by side" in page.text
    assert page.text.count("another") == 4


def title_in_browser(folder: Path, html: str, *, width: int = 1280) -> str:
    """The title that a page's script leaves; skips where there is no Chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("chromium: not installed")
    page = folder / "report.html"
    page.write_text(html, encoding="utf-8")
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
        page.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return result.stdout.split("<title>")[1].split("</title>")[0]


SCRIPT = """<script>
window.onerror = function (message) { document.title = "error " + message; };
window.addEventListener("load", function () {
  var table = document.getElementById("layertable");
  document.querySelectorAll("details").forEach(function (d) { d.open = true; });
  var head = Array.from(table.tHead.rows[0].cells).find(function (cell) {
    return cell.textContent === "alone"; });
  head.querySelector("button").click();
  var first = table.tBodies[0].rows[0].cells[1].textContent;
  document.querySelector("button[data-precision=fp32]").click();
  var find = document.getElementById("find");
  find.value = "gemm";
  find.dispatchEvent(new Event("input"));
  var wide = document.documentElement.scrollWidth > window.innerWidth;
  var shown = document.getElementById("shown").textContent;
  document.title = ["done", first.trim(), shown, wide].join("|");
});
</script></body>"""


@pytest.mark.slow
def test_a_browser_sorts_and_filters_without_an_error(
    tmp_path: Path, record: RunRecord, layers: list[LayerRow]
) -> None:
    html = report_html(record, layers).replace("</body>", SCRIPT)
    title = title_in_browser(tmp_path, html, width=420)
    done, first, shown, too_wide = title.split("|")
    assert done == "done"
    assert "block.0/Conv pinned" in first.replace("\N{NO-BREAK SPACE}", " ")
    assert shown == "1 of 82"
    assert too_wide == "false"


WIDTHS = """<script>
window.addEventListener("load", function () {
  var box = document.querySelector("#results .scroll");
  document.title = "done|" + Math.max(box.scrollWidth - box.clientWidth, 0);
});
</script></body>"""


@pytest.mark.slow
def test_results_fit_their_page_with_every_column_filled(
    tmp_path: Path, record: RunRecord, layers: list[LayerRow]
) -> None:
    said = {
        "backend": "tensorrt_rtx",
        "verdict": "missed",
        "within_noise": True,
        "interval": (0.8464, 0.8576),
        "latency_ms": {"median": 12.345, "p95": 13.456, "runs": 50, "batch": 8},
        "nodes": {"int8": 60, "fp8": 4, "fp16": 8, "fp32": 10},
    }
    variants = [Variant.model_validate({**v.model_dump(), **said}) for v in record.variants]
    html = report_html(record.model_copy(update={"variants": variants}), layers)
    assert "speed\N{NON-BREAKING HYPHEN}up" in html
    assert title_in_browser(tmp_path, html.replace("</body>", WIDTHS)) == "done|0"


def test_what_engines_and_preparation_say(record: RunRecord, layers: list[LayerRow]) -> None:
    lint = {"kind": "reformat", "layer": "r", "nodes": ["conv_1"], "found": EVIL, "remedy": "pin"}
    said = {"lints": [EngineFinding.model_validate(lint)] * 45, "explained": [EVIL]}
    update = {
        "variants": [record.variants[-1].model_copy(update=said)],
        "prepared": {EVIL: ["scale", "shift"], "conv": ["round", "new-move"]},
    }
    page = parse(report_html(record.model_copy(update=update), layers))
    assert {"engines", "prepared"} <= set(page.ids)
    assert "and 5 more findings in engine.json" in page.text
    assert "channels scaled to a common range; shifted to the middle of its range" in page.text
    assert "new-move" in page.text


def test_bars_histograms_and_rows_lead_to_each_other(
    record: RunRecord, layers: list[LayerRow]
) -> None:
    row = layers[0].model_copy(update={"tensor": record.histograms[0].tensor})
    page = parse(report_html(record, [row, *layers[1:]]))
    assert {"#h1", "#r1"} <= set(page.links)


@pytest.mark.parametrize(("count", "is_open"), [(5, True), (2000, False)])
def test_a_short_layer_table_is_open_and_a_long_one_stays_small(
    count: int, is_open: bool, record: RunRecord, layers: list[LayerRow]
) -> None:
    names = [f"/features/features.{k // 9}/block/block.{k}/conv/Conv" for k in range(count)]
    rows = [
        layers[0].model_copy(
            update={"node": name, "tensor": f"{name}_output_0", "producers": str(k or "")}
        )
        for k, name in enumerate(names)
    ]
    ranges = [
        TensorRange(
            tensor=row.tensor, amax=1.5, max=2.0, method="mse", heights="aZ" * 40, item="17.png"
        )
        for row in rows
    ]
    html = report_html(record.model_copy(update={"ranges": ranges}), rows)
    summary = f"{count} nodes" if count < 82 else f"82 layers and {count - 82} other nodes"
    assert f"<summary>{summary}</summary>" in html
    assert (f"<details open><summary>{summary}" in html) == is_open
    assert len(html.encode()) < 3_000_000


def colours(style: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", style))


def contrast(first: str, second: str) -> float:
    """The contrast of two colours by WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        red, green, blue = (
            p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read(theme: str, record: RunRecord) -> None:
    html = report_html(record)
    start = html.index("prefers-color-scheme: dark") if theme == "dark" else 0
    end = html.index("* { box-sizing") if theme == "dark" else html.index("prefers-color-scheme")
    found = colours(html[start:end])
    pairs = [
        (ink, ground)
        for ink in ("ink", "soft", "muted", "accent")
        for ground in ("page", "surface", "raised")
    ]
    pairs += [(name, f"{name}-soft") for name in ("good", "warn", "bad", "int8", "fp16", "bf16")]
    pairs += [("fp32", "fp32-soft"), ("warn", "surface"), ("ink", "warn-soft")]
    assert {p: c for p in pairs if (c := contrast(found[p[0]], found[p[1]])) < 4.5} == {}


WINDOW = """<script>
var seen = [], body = document.getElementById("layertable").tBodies[0];
var shown = function () { return body.rows.length; };
window.onerror = function (message) { document.title = message; };
seen.push(shown());
location.hash = "#r1500";
setTimeout(function () {
  var row = document.getElementById("r1500"), box = document.querySelector(".windowbox");
  var at = row.getBoundingClientRect(), frame = box.getBoundingClientRect();
  seen.push(at.top >= frame.top && at.bottom <= frame.bottom, shown());
  var find = document.getElementById("find");
  find.value = "/block/1234/";
  find.dispatchEvent(new Event("input"));
  seen.push(document.getElementById("shown").textContent);
  window.dispatchEvent(new Event("beforeprint"));
  seen.push(shown());
  document.title = seen.join("|");
}, 300);
</script></body>"""


@pytest.mark.slow
def test_of_a_large_table_a_browser_holds_only_the_rows_in_sight(
    tmp_path: Path, record: RunRecord, layers: list[LayerRow]
) -> None:
    rows = [layers[0].model_copy(update={"node": f"/block/{k}/conv/Conv"}) for k in range(2000)]
    title = title_in_browser(tmp_path, report_html(record, rows).replace("</body>", WINDOW))
    first, in_sight, later, found, printed = title.split("|")
    assert int(first) < 200
    assert in_sight == "true"
    assert int(later) < 200
    assert found == "1 of 2000"
    assert int(printed) == 1


INSPECT = """<script>
var seen = [];
window.onerror = function (message) { document.title = message; };
window.addEventListener("load", function () {
  var box = document.getElementById("inspector");
  document.querySelector(".plotbox a[data-layer='3']").dispatchEvent(
    new MouseEvent("click", { bubbles: true, cancelable: true }));
  seen.push(box.open, box.querySelector("h2").textContent);
  seen.push(box.querySelectorAll(".plotted rect").length, box.querySelectorAll("img").length);
  seen.push(box.querySelector(".around").textContent.indexOf("/made/by/it") >= 0);
  seen.push(box.querySelector("dl").textContent.indexOf("channels scaled") >= 0);
  box.querySelector("[data-go='1']").click();
  seen.push(box.querySelector("h2").textContent);
  box.close();
  var any = document.getElementById("anytensor");
  any.focus();
  any.value = document.getElementById("tensors").children[1].value;
  any.dispatchEvent(new Event("input"));
  seen.push(document.querySelectorAll("#anyplot rect").length);
  var link = document.querySelector(".bars a");
  link.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
  seen.push(document.getElementById("tip").textContent.indexOf(" dB") > 0);
  document.title = seen.join("|");
});
</script></body>"""


@pytest.mark.slow
def test_a_browser_shows_a_layer_with_its_histogram_picture_and_neighbours(
    tmp_path: Path, record: RunRecord, layers: list[LayerRow]
) -> None:
    names = ("/first", "/reader", EVIL, "/made/by/it")
    makers = ("", "1", "2 1", "3")
    rows = [
        layers[k].model_copy(update={"node": name, "producers": maker, "tensor": f"t{k}"})
        for k, (name, maker) in enumerate(zip(names, makers, strict=True))
    ]
    ranges = [
        TensorRange(tensor=f"t{k}", amax=0.5, max=1.0, method="mse", heights="0aZ", item=EVIL)
        for k in range(4)
    ]
    update = {
        "ranges": ranges,
        "thumbnails": {EVIL: "data:image/gif;base64,R0lGODlhAQABAAAAACw="},
        "prepared": {EVIL: ["scale"]},
    }
    html = report_html(record.model_copy(update=update), rows)
    title = title_in_browser(tmp_path, html.replace("</body>", INSPECT))
    expected = ["true", EVIL, "3", "1", "true", "true", "/made/by/it", "3", "true"]
    assert unescape(title).split("|") == expected


def test_pictures_are_beside_the_histograms_that_they_stretch(
    record: RunRecord, layers: list[LayerRow]
) -> None:
    address = "data:image/jpeg;base64,AAAA"
    plots = [plot.model_copy(update={"item": "321"}) for plot in record.histograms]
    shown = record.model_copy(update={"thumbnails": {"321": address}, "histograms": plots})
    html = report_html(shown, layers)
    assert html.count(address) == 1 + len(plots)
    assert 'alt="calibration picture 321"' in html
    assert 'alt="picture 321, which sets the largest value"' in html
    assert '<a href="#p1">321</a>' in html


@pytest.mark.parametrize(
    ("part", "total", "expected"),
    [(321, 322, "321 of 322"), (53, 53, "53 of 53"), (1, 3, "1 of 3")],
)
def test_a_share_is_whole_only_if_all_are(
    part: int, total: int, expected: str, record: RunRecord
) -> None:
    nodes = {"int8": part, "fp32": total - part}
    variants = [v.model_copy(update={"nodes": nodes}) for v in record.variants]
    page = parse(report_html(record.model_copy(update={"variants": variants})))
    assert expected in page.text
    assert ("100 %" in page.text) == (part == total)
