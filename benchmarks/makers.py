#!/usr/bin/env python3
"""Quantized models of other tools: the linter, the compiler on the file, and the import.

    python benchmarks/makers.py make nncf FOLDER             quantize the tiny networks with a tool
    python benchmarks/makers.py make nncf FOLDER --data D    networks trained on pictures
    python benchmarks/makers.py table FOLDER                 every model in FOLDER: the matrix
    python benchmarks/makers.py accuracy FOLDER --data D     top-1 of the files and of their imports

`make` runs in an environment of the tool's own, which does not need this package; what each tool
takes stands in `makers_tools.py`. `table` needs TensorRT-RTX and no tool, `accuracy` neither. `D`
holds `models/NAME.onnx`, `cifar10_calib512.npz` and `cifar10_test2000.npz`. The small models that
the tests read, `tests/made`, come from here. Writes `results/makers.md` and
`results/makers_accuracy.md`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from makers_tools import TOOLS, Job
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).resolve().parent
OPSET = 17
SAMPLES = 16
TRAINED = ("resnet20_cifar10", "mobilenetv2_cifar10")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PICTURES, BATCH = 256, 32
HEADER = (
    "model", "findings", "compiler on the file", "linter and compiler", "import", "SQNR",
    "compiler on the import", "strip and insert", "cache",
)  # fmt: skip


class Tiny:
    """A network being put together, its weights drawn from a fixed seed."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(7)

    def op(self, kind: str, *inputs: str, out: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [out], name=f"n_{out}", **attributes))
        return out

    def const(self, name: str, value: Any) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        fan = float(np.prod(shape[1:])) or 1.0
        return self.const(name, self.rng.normal(0, fan**-0.5, shape).astype(np.float32))

    def conv(self, x: str, out: str, cin: int, cout: int, k: int = 3, **attributes: Any) -> str:
        w = self.weight(f"{out}_w", cout, cin // int(attributes.get("group", 1)), k, k)
        b = self.weight(f"{out}_b", cout)
        return self.op(
            "Conv", x, w, b, out=out, kernel_shape=[k, k], pads=[k // 2] * 4, **attributes
        )

    def model(self, shape: list[Any], classes: int) -> onnx.ModelProto:
        infos = [
            helper.make_tensor_value_info("input", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes]),
        ]
        graph = helper.make_graph(self.nodes, "tiny", infos[:1], infos[1:], self.weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        proto.ir_version = 8
        return onnx.shape_inference.infer_shapes(proto)


def cnn() -> onnx.ModelProto:
    """Convolutions with a residual Add, a depthwise one behind a Clip, a pool, a Gemm."""
    net = Tiny()
    x = net.op("Relu", net.conv("input", "stem", 3, 16), out="stem_relu")
    y = net.op("Relu", net.conv(x, "c1", 16, 16), out="c1_relu")
    x = net.op("Relu", net.op("Add", net.conv(y, "c2", 16, 16), x, out="sum"), out="sum_relu")
    low, high = net.const("low", np.float32(0)), net.const("high", np.float32(6))
    x = net.op("Clip", net.conv(x, "dw", 16, 16, group=16), low, high, out="dw_clip")
    x = net.op("Relu", net.conv(x, "pw", 16, 32, 1), out="pw_relu")
    x = net.op("Flatten", net.op("GlobalAveragePool", x, out="pooled"), out="flat")
    net.op("Gemm", x, net.weight("fc_w", 10, 32), net.weight("fc_b", 10), out="logits", transB=1)
    return net.model(["N", 3, 16, 16], 10)


def transformer() -> onnx.ModelProto:
    """One head of attention with its projections, a residual Add, and a classifier."""
    net = Tiny()
    parts = {}
    for name in ("q", "k", "v"):
        product = net.op("MatMul", "input", net.weight(f"{name}_w", 32, 32), out=f"{name}_m")
        parts[name] = net.op("Add", product, net.weight(f"{name}_b", 32), out=name)
    turned = net.op("Transpose", parts["k"], out="k_t", perm=[0, 2, 1])
    scores = net.op("MatMul", parts["q"], turned, out="scores")
    scaled = net.op("Mul", scores, net.const("factor", np.float32(32**-0.5)), out="scaled")
    mixed = net.op("MatMul", net.op("Softmax", scaled, out="p", axis=-1), parts["v"], out="mixed")
    x = net.op("Add", net.op("MatMul", mixed, net.weight("o_w", 32, 32), out="o"), "input", out="s")
    pooled = net.op("ReduceMean", x, out="pooled", axes=[1], keepdims=0)
    net.op("Gemm", pooled, net.weight("fc_w", 10, 32), net.weight("fc_b", 10), out="logits",
           transB=1)  # fmt: skip
    return net.model(["N", 16, 32], 10)


NETWORKS: Mapping[str, Callable[[], onnx.ModelProto]] = {"cnn": cnn, "tr": transformer}


def rows_for(proto: onnx.ModelProto) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Calibration data: one row a feed."""
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    shape = [dim.dim_value or 1 for dim in dims]
    rng = np.random.default_rng(11)
    return [{"input": rng.normal(0, 1, shape).astype(np.float32)} for _ in range(SAMPLES)]


def make(tool: str, target: Path, data: Path | None) -> None:
    """Quantize every network with `tool` into `target`; what fails is said, and the rest made."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for job, name in _jobs(Path(folder), data):
            for word, write in TOOLS[tool](job):
                path = target / f"{tool}_{word}_{name}.onnx"
                try:
                    write(path)
                except Exception as error:  # whatever another tool raises
                    path.unlink(missing_ok=True)
                    told = str(error).partition("\n")[0]
                    print(f"{path.stem}: {tool} fails: {type(error).__name__}: {told}", flush=True)
                else:
                    print(f"{path} ({path.stat().st_size} bytes)", flush=True)


def _jobs(folder: Path, data: Path | None) -> Iterator[tuple[Job, str]]:
    """The tiny networks on noise, or those of `data` on its pictures."""
    if data is None:
        for name, network in NETWORKS.items():
            proto, source = network(), folder / f"{name}.onnx"
            onnx.save(proto, source)
            yield Job(source, proto, rows_for(proto)), name
        return
    for name in TRAINED:
        source = data / "models" / f"{name}.onnx"
        with np.load(data / "cifar10_calib512.npz") as held:
            values = normalised(held["images"][:PICTURES])
        rows = [{"input": part} for part in np.split(values, PICTURES // BATCH)]
        yield Job(source, onnx.load(source), rows, main=True), name


def normalised(pictures: Any) -> np.ndarray[Any, Any]:
    """CIFAR pictures, uint8 NHWC, as the shared networks read them: float32 NCHW."""
    values = (pictures / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2), np.float32)


def row_of(path: Path) -> tuple[str, ...]:
    """The matrix' row of one model."""
    from trtune.configs.errors import TrtuneError
    from trtune.precision.quantized.findings import counts
    from trtune.precision.quantized.importing import import_quantized, lint_model
    from trtune.tools import lint_against_builder

    found = lint_model(path)
    seen = lint_against_builder(path, found)
    kinds = ", ".join(f"{kind} {count}" for kind, count in counts(found).items()) or "none"
    file = "refused" if seen.refused else _counted(p.found for p in seen.products)
    agreed = "; ".join(seen.disagreements) or "agree"
    words = "exact"
    try:
        try:
            model = import_quantized(path)
        except TrtuneError:
            words = "with allow_requantize"
            model = import_quantized(path, allow_requantize=True)
    except TrtuneError as error:
        first, *rest = str(error).splitlines()
        why = next((line for line in rest if line), first.partition(" holds ")[2])
        return path.stem, kinds, file, agreed, f"refused: {why}", "", "", "", ""
    made = Counter(model.plan.precision(n) for n in model.plan.quantized_nodes) or {"int8": 0}
    counted = ", ".join(
        f"{count} of {len(model.plan.compute_nodes)} {k}" for k, count in made.items()
    )
    words = f"{words}, {counted}"
    return path.stem, kinds, file, agreed, words, *_of_import(path, model)


def _of_import(path: Path, model: Any) -> tuple[str, str, str, str]:
    """SQNR against the file, the compiler's kernels, strip and insert, and the cache."""
    from trtune.datasets.batches import Batch
    from trtune.precision.backends.rtx.backend import RtxBackend
    from trtune.precision.quantized.importing import quantization_errors
    from trtune.precision.runtime.api import Candidate

    rows = rows_for(model.original.proto)
    batch = Batch(rows[0], ("0",))
    sqnr = min(error.sqnr_db for error in quantization_errors(model, [batch]).values())
    planned, products = model.plan.quantized_nodes, model.plan.compute_nodes
    with tempfile.TemporaryDirectory() as folder:
        backend = RtxBackend(compute_capabilities=["8.9"])
        info = backend.build(Candidate(model.model, model.plan, model.table), Path(folder))
        made = _counted(info.precisions[node] for node in products)
        missed = sum(info.precisions[node] != model.plan.precision(node) for node in planned)
        kernels = made + (f", {missed} missed" if missed else "")
        exact = "the same bits" if np.isinf(sqnr) else f"{sqnr:.1f} dB"
        return exact, kernels, *_taken_out(path, model, Path(folder))


def _taken_out(path: Path, model: Any, folder: Path) -> tuple[str, str]:
    """Whether strip and insert give the import again, and how many scales a cache of it holds."""
    from trtune.configs.errors import TrtuneError
    from trtune.precision.quantized.importing import insert_file, insert_quantization
    from trtune.tools import cache_from_qdq, strip_qdq

    fp32, scales, again = (folder / name for name in ("fp32.onnx", "q.cache", "again.onnx"))
    try:
        strip_qdq(path, fp32, scales, requantize=True)
        insert_file(fp32, scales, again)
        cache, left = cache_from_qdq(path, "10.14.1", folder / "trt.cache", requantize=True)
    except TrtuneError as error:
        told = str(error).partition(":")[2].partition(";")[0].strip()
        return told, ""
    direct = folder / "direct.onnx"
    onnx.save(insert_quantization(model.model, model.table), direct)
    feeds = rows_for(model.original.proto)[0]
    same = all(
        np.array_equal(a, b) for a, b in zip(_run(again, feeds), _run(direct, feeds), strict=True)
    )
    told = f"{len(cache.scales)} scales" + (f", {len(left)} nodes float" if left else "")
    return "the same bits" if same else "differs", told


def _run(path: Path, feeds: Mapping[str, Any]) -> list[Any]:
    from trtune.calibrate.sessions import open_session

    found: list[Any] = open_session(path).run(None, dict(feeds))
    return found


def _counted(kinds: Any) -> str:
    return ", ".join(f"{count} {kind or '?'}" for kind, count in Counter(kinds).most_common())


def table(folder: Path) -> None:
    """The matrix of every model in `folder`, as it is printed and kept."""
    rows = []
    for path in sorted(folder.glob("*.onnx")):
        rows.append(row_of(path))
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    write_table(rows)


def write_table(rows: list[tuple[str, ...]]) -> None:
    """The matrix with what it adds up to, to `results/makers.md`."""
    agreed = sum(row[3] == "agree" for row in rows)
    taken = sum(not row[4].startswith("refused") for row in rows)
    built = sum(row[6] != "" and "missed" not in row[6] for row in rows)
    total = (
        f"{len(rows)} models of {len({_tool(row[0]) for row in rows})} tools: linter and compiler "
        f"agree on {agreed}; {taken} are imported, {sum(row[5] == 'the same bits' for row in rows)}"
        f" of them bit for bit; {built} build with every node as planned, in int8 or fp8."
    )
    print(total)
    _write("makers.md", "Quantized models of other tools", total, HEADER, rows)


def _tool(stem: str) -> str:
    return max((tool for tool in TOOLS if stem.startswith(tool)), key=len, default=stem)


def _write(
    name: str, title: str, text: str, header: tuple[str, ...], rows: list[tuple[str, ...]]
) -> None:
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    content = "\n".join([f"# {title}", "", text, "", *lines, ""])
    (HERE / "results" / name).write_text(content, "utf-8")


def accuracy(folder: Path, data: Path) -> None:
    """Top-1 of every file in `folder` as it stands, and of what is imported from it."""
    rows = []
    for path in sorted(folder.glob("*.onnx")):
        rows.append(accuracy_row(path, data))
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    write_accuracy(rows)


def accuracy_row(path: Path, data: Path) -> tuple[str, ...]:
    """Top-1 of FP32, of the file, of the import, and what the import takes."""
    from trtune.configs.errors import TrtuneError
    from trtune.precision.lower.half_on_cpu import in_float32
    from trtune.precision.quantized.importing import import_quantized, insert_quantization

    with np.load(data / "cifar10_test2000.npz") as held:
        pictures, labels = normalised(held["images"]), held["labels"]
    name = next(name for name in TRAINED if path.stem.endswith(name))
    fp32 = _top1(onnx.load(data / "models" / f"{name}.onnx"), pictures, labels)
    file = _top1(in_float32(onnx.load(path)), pictures, labels)
    words = "exact"
    try:
        model = import_quantized(path)
    except TrtuneError:
        words = "with allow_requantize"
        model = import_quantized(path, allow_requantize=True)
    proto = in_float32(insert_quantization(model.model, model.table))
    ours = _top1(proto, pictures, labels)
    numbers = (f"{100 * value:.2f}" for value in (fp32, file, ours))
    return path.stem, *numbers, f"{100 * (ours - file):+.2f}", words


def write_accuracy(rows: list[tuple[str, ...]]) -> None:
    """The table of accuracies, to `results/makers_accuracy.md`."""
    text = (
        "Top-1 in percent: of the network in FP32, of the file as the tool wrote it, and of what "
        "is imported from it; all with the integer kernels of onnxruntime. "
        f"{PICTURES} pictures calibrated. A difference is that of the import from the file."
    )
    left = [name for name in TRAINED if not any(row[0].endswith(name) for row in rows)]
    text += f" Not measured: {', '.join(left)}." if left else ""
    header = ("model", "FP32", "file", "import", "difference", "import is")
    _write("makers_accuracy.md", "Accuracy of quantized models of other tools", text, header, rows)


def _top1(proto: onnx.ModelProto, pictures: Any, labels: Any) -> float:
    from trtune.precision.runtime.session import make_session

    session = make_session(proto, integer_kernels=True)
    name, batch = proto.graph.input[0].name, proto.graph.input[0].type.tensor_type.shape.dim[0]
    step = batch.dim_value or 100
    right = 0
    for start in range(0, len(labels), step):
        (logits,) = session.run(["logits"], {name: pictures[start : start + step]})
        right += int(np.sum(logits.argmax(1) == labels[start : start + step]))
    return right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make", help="quantize the tiny networks with one tool")
    maker.add_argument("tool", choices=TOOLS)
    maker.add_argument("folder", type=Path)
    maker.add_argument("--data", type=Path, help="quantize the networks here instead")
    commands.add_parser("table", help="the matrix").add_argument("folder", type=Path)
    top1 = commands.add_parser("accuracy", help="top-1 of files and imports")
    top1.add_argument("folder", type=Path)
    top1.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    match given.command:
        case "make":
            make(given.tool, given.folder, given.data)
        case "table":
            table(given.folder)
        case _:
            accuracy(given.folder, given.data)


if __name__ == "__main__":
    main()
