#!/usr/bin/env python3
"""Quantized models of other tools: the linter, the compiler on the file, and the import.

    python benchmarks/makers.py make onnxruntime FOLDER    quantize the tiny networks with one tool
    python benchmarks/makers.py table FOLDER               every model in FOLDER: the matrix

`make` runs in an environment of the tool's own, which needs onnx and NumPy beside it and not this
package: `onnxruntime`, `nncf` (`pip install nncf onnxruntime`), `modelopt`
(`pip install 'nvidia-modelopt[onnx]'`). `table` needs TensorRT-RTX and no tool. The small models
that the tests read, `tests/made`, come from here. Writes `results/makers.md`.
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
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).resolve().parent
OPSET = 17
SAMPLES = 16
HEADER = (
    "model", "findings", "compiler on the file", "linter and compiler", "import",
    "compiler on the import",
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


def by_onnxruntime(source: Path, proto: onnx.ModelProto, target: Path) -> Iterator[Path]:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    class Reader:
        def __init__(self) -> None:
            self.rows = iter(rows_for(proto))

        def get_next(self) -> Any:
            return next(self.rows, None)

    for form, kind in (
        (QuantFormat.QDQ, QuantType.QInt8),
        (QuantFormat.QDQ, QuantType.QUInt8),
        (QuantFormat.QOperator, QuantType.QUInt8),
    ):
        word = {QuantFormat.QDQ: "qdq", QuantFormat.QOperator: "qop"}[form]
        path = target / f"ort_{word}_{'s8' if kind == QuantType.QInt8 else 'u8'}_{source.stem}.onnx"
        symmetric = kind == QuantType.QInt8
        quantize_static(
            source,
            path,
            Reader(),  # type: ignore[arg-type]
            quant_format=form,
            activation_type=kind,
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True},
        )
        yield path


def by_nncf(source: Path, proto: onnx.ModelProto, target: Path) -> Iterator[Path]:
    import nncf

    data = nncf.Dataset(rows_for(proto), lambda row: row)
    for preset in (nncf.QuantizationPreset.PERFORMANCE, nncf.QuantizationPreset.MIXED):
        made = nncf.quantize(
            onnx.load(source), data, preset=preset, subset_size=SAMPLES,
            target_device=nncf.TargetDevice.ANY,
        )  # fmt: skip
        path = target / f"nncf_{preset.value}_{source.stem}.onnx"
        onnx.save(made, path)
        yield path


def by_modelopt(source: Path, proto: onnx.ModelProto, target: Path) -> Iterator[Path]:
    from modelopt.onnx.quantization import quantize

    data = {"input": np.concatenate([row["input"] for row in rows_for(proto)])}
    for rest in ("fp16", "bf16", "fp32"):
        path = target / f"modelopt_int8_{rest}_{source.stem}.onnx"
        quantize(
            str(source), quantize_mode="int8", calibration_data=data, calibration_method="max",
            calibration_eps=["cpu"], high_precision_dtype=rest, output_path=str(path),
        )  # fmt: skip
        yield path


TOOLS = {"onnxruntime": by_onnxruntime, "nncf": by_nncf, "modelopt": by_modelopt}


def make(tool: str, target: Path) -> None:
    """Quantize every network with `tool` into `target`; what fails is said, and the rest made."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, network in NETWORKS.items():
            proto, source = network(), Path(folder) / f"{name}.onnx"
            onnx.save(proto, source)
            made = TOOLS[tool](source, proto, target)
            while True:
                try:
                    path = next(made)
                except StopIteration:
                    break
                except Exception as error:
                    print(f"{tool} fails on {name}: {type(error).__name__}: {error}")
                    break
                print(f"{path} ({path.stat().st_size} bytes)")


def row_of(path: Path) -> tuple[str, ...]:
    """The matrix' row of one model."""
    from trtune.configs.errors import ModelError
    from trtune.precision.backends.rtx.backend import RtxBackend
    from trtune.precision.quantized.findings import counts
    from trtune.precision.quantized.importing import import_quantized, lint_model
    from trtune.precision.runtime.api import Candidate
    from trtune.tools import lint_against_builder

    found = lint_model(path)
    seen = lint_against_builder(path, found)
    kinds = ", ".join(f"{kind} {count}" for kind, count in counts(found).items()) or "none"
    file = "refused" if seen.refused else _counted(p.found for p in seen.products)
    agreed = "; ".join(seen.disagreements) or "agree"
    words = "exact"
    try:
        model = import_quantized(path)
    except ModelError:
        words = "with allow_requantize"
        try:
            model = import_quantized(path, allow_requantize=True)
        except ModelError as error:
            return path.stem, kinds, file, agreed, f"refused: {error}".splitlines()[0], ""
    with tempfile.TemporaryDirectory() as folder:
        backend = RtxBackend(compute_capabilities=["8.9"])
        info = backend.build(Candidate(model.model, model.plan, model.table), Path(folder))
    planned, products = model.plan.int8_nodes, model.plan.compute_nodes
    words = f"{words}, {len(planned)} of {len(products)} int8"
    made = _counted(info.precisions[node] for node in products)
    missed = sum(info.precisions[node] != "int8" for node in planned)
    return path.stem, kinds, file, agreed, words, made + (f", {missed} missed" if missed else "")


def _counted(kinds: Any) -> str:
    return ", ".join(f"{count} {kind or '?'}" for kind, count in Counter(kinds).most_common())


def table(folder: Path) -> None:
    """The matrix of every model in `folder`, as it is printed and kept."""
    lines = [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
    for path in sorted(folder.glob("*.onnx")):
        lines.append(f"| {' | '.join(row_of(path))} |")
        print(lines[-1])
    target = HERE / "results" / "makers.md"
    target.write_text("\n".join(["# Quantized models of other tools", "", *lines, ""]), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make", help="quantize the tiny networks with one tool")
    maker.add_argument("tool", choices=TOOLS)
    maker.add_argument("folder", type=Path)
    commands.add_parser("table", help="the matrix").add_argument("folder", type=Path)
    given = parser.parse_args()
    if given.command == "make":
        make(given.tool, given.folder)
    else:
        table(given.folder)


if __name__ == "__main__":
    main()
