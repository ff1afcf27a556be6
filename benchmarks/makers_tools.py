"""What each public quantizer makes of a small network: its usual settings, and its odd ones.

Each function runs in an environment that holds its tool, with onnx and NumPy, and not this package.
It yields pairs of a word for the settings and what makes the file: one that fails is told, and the
others go on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

Rows = list[dict[str, np.ndarray[Any, Any]]]
Made = Iterator[tuple[str, Callable[[Path], Any]]]


@dataclass(frozen=True)
class Job:
    """A network to be quantized: its file, what is in it, calibration rows, and what it is called.

    `main` says that the usual settings of each tool are wanted alone.
    """

    source: Path
    proto: onnx.ModelProto
    rows: Rows
    main: bool = False

    @property
    def name(self) -> str:
        """The input's name."""
        return str(self.proto.graph.input[0].name)

    @property
    def together(self) -> np.ndarray[Any, Any]:
        """All rows in one array."""
        return np.concatenate([row[self.name] for row in self.rows])


class Reader:
    """Calibration rows as onnxruntime and Quark read them."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.rewind()

    def get_next(self) -> Any:
        """The next row, None at the end."""
        return next(self.left, None)

    def rewind(self) -> None:
        """Begin again."""
        self.left = iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def by_onnxruntime(job: Job) -> Made:
    """`quantize_static` in its two forms and its types, and `quantize_dynamic`."""
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    def static(form: Any, kind: Any, weights: Any, *, each: bool, **extra: Any) -> Any:
        def make(path: Path) -> None:
            symmetric = kind in (QuantType.QInt8, QuantType.QInt16)
            quantize_static(
                job.source, path, Reader(job.rows),  # type: ignore[arg-type]
                quant_format=form, activation_type=kind, weight_type=weights, per_channel=each,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={
                    "ActivationSymmetric": symmetric, "WeightSymmetric": weights == QuantType.QInt8,
                    **extra,
                },
            )  # fmt: skip

        return make

    s8, u8 = QuantType.QInt8, QuantType.QUInt8
    qdq, qop = QuantFormat.QDQ, QuantFormat.QOperator
    yield "qdq_s8", static(qdq, s8, s8, each=True)
    yield "qdq_u8", static(qdq, u8, s8, each=True)
    if job.main:
        return
    yield "qop_u8", static(qop, u8, s8, each=True)
    yield "qop_s8", static(qop, s8, s8, each=False)
    yield "qdq_pt_u8u8", static(qdq, u8, u8, each=False)
    yield "qdq_no_bias_s8", static(qdq, s8, s8, each=True, QuantizeBias=False)
    yield "qdq_s16", static(qdq, QuantType.QInt16, s8, each=True)
    yield "dynamic", lambda path: quantize_dynamic(job.source, path)


def by_nncf(job: Job) -> Made:
    """`nncf.quantize` with its presets, and what it does for transformers."""
    import nncf

    def quantize(**options: Any) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            made = nncf.quantize(
                onnx.load(job.source), nncf.Dataset(job.rows, lambda row: row),
                subset_size=len(job.rows), target_device=nncf.TargetDevice.ANY, **options,
            )  # fmt: skip
            onnx.save(made, path)

        return make

    presets = nncf.QuantizationPreset
    yield "performance", quantize(preset=presets.PERFORMANCE)
    yield "mixed", quantize(preset=presets.MIXED)
    if not job.main:
        yield "transformer", quantize(model_type=nncf.ModelType.TRANSFORMER)


def by_modelopt(job: Job) -> Made:
    """Model-Optimizer's quantizer of ONNX files."""
    from modelopt.onnx.quantization import quantize

    def make_with(mode: str, method: str, rest: str) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            quantize(
                str(job.source), quantize_mode=mode, calibration_data={job.name: job.together},
                calibration_method=method, calibration_eps=["cpu"], high_precision_dtype=rest,
                output_path=str(path),
            )  # fmt: skip

        return make

    for rest in ("fp16", "fp32") if job.main else ("fp16", "bf16", "fp32"):
        yield f"int8_{rest}", make_with("int8", "max", rest)
    yield "int8_entropy", make_with("int8", "entropy", "fp32")
    if not job.main:
        yield "fp8_fp16", make_with("fp8", "max", "fp16")
        yield "fp8_fp32", make_with("fp8", "max", "fp32")
        yield "int4_rtn", make_with("int4", "rtn_dq", "fp32")
        yield "int4_awq", make_with("int4", "awq_clip", "fp32")


def _export(model: Any, job: Job, path: Path, opset: int = 17) -> None:
    """A torch module through the exporter that knows fake quantization."""
    import torch

    torch.onnx.export(
        model, (torch.from_numpy(job.rows[0][job.name]),), str(path), dynamo=False,
        opset_version=opset, input_names=[job.name], output_names=["logits"],
        dynamic_axes={job.name: {0: "N"}, "logits": {0: "N"}},
    )  # fmt: skip


def _fed(model: Any, job: Job) -> Any:
    import torch

    with torch.no_grad():
        for row in job.rows:
            model(torch.from_numpy(row[job.name]))
    return model


def by_modelopt_torch(job: Job) -> Made:
    """Model-Optimizer's quantizer of torch modules."""
    import modelopt.torch.quantization as mtq
    from makers_torch import module_of

    def quantize(config: Any) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            made = mtq.quantize(
                module_of(job.proto), copy.deepcopy(config), lambda model: _fed(model, job)
            )
            _export(made, job, path)

        return make

    yield "int8", quantize(mtq.INT8_DEFAULT_CFG)
    if not job.main:
        yield "smooth", quantize(mtq.INT8_SMOOTHQUANT_CFG)
        yield "fp8", quantize(mtq.FP8_DEFAULT_CFG)


def by_brevitas(job: Job) -> Made:
    """Brevitas, layer by layer and as a graph, exported as Q, Clip, DQ."""
    import torch
    from brevitas.export import export_onnx_qcdq
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import (
        LAYERWISE_COMPUTE_LAYER_MAP,
        layerwise_quantize,
        preprocess_for_quantize,
        quantize,
    )
    from brevitas.quant import (
        Int8ActPerTensorFloat,
        Int8WeightPerChannelFloat,
        Int8WeightPerTensorFloat,
        ShiftedUint8ActPerTensorFloat,
    )
    from makers_torch import module_of

    def export(model: Any, path: Path) -> None:
        with torch.no_grad(), calibration_mode(model):
            _fed(model, job)
        sample = torch.from_numpy(job.rows[0][job.name])
        export_onnx_qcdq(
            model.eval(), args=sample, export_path=str(path), opset_version=17, dynamo=False,
            input_names=[job.name], output_names=["logits"],
            dynamic_axes={job.name: {0: "N"}, "logits": {0: "N"}},
        )  # fmt: skip

    def layers(weights: Any, data: Any) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            known: dict[Any, Any] = {}
            for kind, held in LAYERWISE_COMPUTE_LAYER_MAP.items():
                if held is not None:
                    layer, options = held
                    options = {**options, "weight_quant": weights, "input_quant": data}
                    options["bias_quant"] = None
                    held = (layer, options)
                known[kind] = held
            export(layerwise_quantize(module_of(job.proto), compute_layer_map=known), path)

        return make

    def graph(path: Path) -> None:
        ready = preprocess_for_quantize(module_of(job.proto), trace_model=False, equalize_iters=0)
        export(quantize(ready), path)

    yield "pc_s8", layers(Int8WeightPerChannelFloat, Int8ActPerTensorFloat)
    yield "pt_s8", layers(Int8WeightPerTensorFloat, Int8ActPerTensorFloat)
    yield "pc_u8", layers(Int8WeightPerChannelFloat, ShiftedUint8ActPerTensorFloat)
    if not job.main:
        yield "graph", graph


def by_torch_fx(job: Job) -> Made:
    """torch.ao's graph mode with fake quantization, symmetric, default, and on weights alone."""
    import torch
    from makers_torch import module_of
    from torch.ao.quantization import (
        FakeQuantize,
        MinMaxObserver,
        NoopObserver,
        PerChannelMinMaxObserver,
        QConfig,
        QConfigMapping,
        disable_observer,
        get_default_qat_qconfig_mapping,
    )
    from torch.ao.quantization.backend_config import (
        get_native_backend_config,
        get_tensorrt_backend_config,
    )
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    s8 = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8}
    weights = FakeQuantize.with_args(
        observer=PerChannelMinMaxObserver, qscheme=torch.per_channel_symmetric, ch_axis=0, **s8
    )
    data = FakeQuantize.with_args(observer=MinMaxObserver, qscheme=torch.per_tensor_symmetric, **s8)

    def quantize(mapping: Any, backend: Any) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            sample = (torch.from_numpy(job.rows[0][job.name]),)
            ready = prepare_qat_fx(
                module_of(job.proto).train(), mapping, sample, backend_config=backend
            )
            _fed(ready, job)
            ready.apply(disable_observer)
            _export(ready.eval(), job, path)

        return make

    symmetric = QConfigMapping().set_global(QConfig(activation=data, weight=weights))
    yield "s8", quantize(symmetric, get_tensorrt_backend_config())
    if job.main:
        return
    alone = QConfig(activation=NoopObserver.with_args(dtype=torch.float32), weight=weights)
    yield "weights", quantize(QConfigMapping().set_global(alone), get_native_backend_config())
    for word in ("x86", "qnnpack"):  # version 0: later ones have operators that ONNX lacks
        mapping = get_default_qat_qconfig_mapping(word, version=0)
        yield word, quantize(mapping, get_native_backend_config())


def by_torch_eager(job: Job) -> Made:
    """torch.ao's eager mode: each layer by itself, with a stub in front."""
    import torch
    from makers_torch import module_of
    from torch.ao.quantization import (
        FakeQuantize,
        MinMaxObserver,
        PerChannelMinMaxObserver,
        QConfig,
        QuantWrapper,
        disable_observer,
        get_default_qat_qconfig,
        prepare_qat,
    )

    s8 = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8}

    def quantize(config: Any) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            model = QuantWrapper(module_of(job.proto)).train()
            model.qconfig = config
            ready = prepare_qat(model)
            _fed(ready, job)
            ready.apply(disable_observer)
            _export(ready.eval(), job, path)

        return make

    symmetric = QConfig(
        activation=FakeQuantize.with_args(
            observer=MinMaxObserver, qscheme=torch.per_tensor_symmetric, **s8
        ),
        weight=FakeQuantize.with_args(
            observer=PerChannelMinMaxObserver, qscheme=torch.per_channel_symmetric, ch_axis=0, **s8
        ),
    )
    yield "s8", quantize(symmetric)
    if not job.main:
        yield "qnnpack", quantize(get_default_qat_qconfig("qnnpack", version=0))


def by_aimet(job: Job) -> Made:
    """AIMET's simulation of ONNX files, exported as Q/DQ."""
    import aimet_onnx
    from aimet_onnx.quantsim import QuantizationSimModel

    def quantize(data: Any, **options: Any) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            simulation = QuantizationSimModel(
                onnx.load(job.source), param_type=aimet_onnx.int8, activation_type=data,
                providers=["CPUExecutionProvider"], **options,
            )  # fmt: skip
            simulation.compute_encodings(job.rows)
            onnx.save(simulation.to_onnx_qdq(), path)

        return make

    yield "w8a8", quantize(aimet_onnx.int8)
    if not job.main:
        yield "w8a16", quantize(aimet_onnx.int16)


def by_quark(job: Job) -> Made:
    """AMD Quark's quantizer of ONNX files."""
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config import Config, get_default_config

    def quantize(word: str) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            config = Config(global_quant_config=get_default_config(word))
            ModelQuantizer(config).quantize_model(str(job.source), str(path), Reader(job.rows))

        return make

    for word in ("XINT8", "U8S8_AAWS", "S8S8_AAWS"):
        yield word.lower(), quantize(word)
    if not job.main:
        for word in ("A16W8", "BF16"):
            yield word.lower(), quantize(word)


TOOLS: Mapping[str, Callable[[Job], Made]] = {
    "onnxruntime": by_onnxruntime,
    "nncf": by_nncf,
    "modelopt": by_modelopt,
    "modelopt_torch": by_modelopt_torch,
    "brevitas": by_brevitas,
    "torch_fx": by_torch_fx,
    "torch_eager": by_torch_eager,
    "aimet": by_aimet,
    "quark": by_quark,
}
