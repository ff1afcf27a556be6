"""Makes a segmenter of three classes and pictures with PNG masks: discs on noise, no training.

Run: python examples/segmenter/make.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

HERE = Path(__file__).resolve().parent
SIZE = 64


def network() -> onnx.ModelProto:
    """A blur, and a score a class: dark ground, red discs, blue discs."""
    blur = np.zeros((3, 1, 5, 5), np.float32) + 1 / 25
    mix = np.array([[-1, 0, -1], [2, 0, -1], [-1, 0, 2]], np.float32).reshape(3, 3, 1, 1)
    bias = np.array([0.75, -0.35, -0.35], np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "blur"], ["smooth"], name="smooth", group=3, pads=[2] * 4),
        helper.make_node("Conv", ["smooth", "mix", "bias"], ["scores"], name="scores"),
    ]
    graph = helper.make_graph(
        nodes,
        "segmenter",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3, SIZE, SIZE])],
        [numpy_helper.from_array(v, k) for k, v in (("blur", blur), ("mix", mix), ("bias", bias))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def picture(rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A picture with two discs, and the mask of its classes."""
    ys, xs = np.mgrid[:SIZE, :SIZE]
    pixels = rng.integers(20, 90, (SIZE, SIZE, 3)).astype(np.uint8)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for kind, channel in ((1, 0), (2, 2)):
        y, x, r = rng.integers(12, 52), rng.integers(12, 52), rng.integers(7, 12)
        disc = (ys - y) ** 2 + (xs - x) ** 2 < r**2
        pixels[disc] = 60
        pixels[disc, channel] = rng.integers(180, 250)
        mask[disc] = kind
    return Image.fromarray(pixels), Image.fromarray(mask)


def main() -> None:
    """Write segmenter.onnx and data/ beside this file."""
    rng = np.random.default_rng(0)
    onnx.save(network(), HERE / "segmenter.onnx")
    for kind in ("images", "masks"):
        (HERE / "data" / kind).mkdir(parents=True, exist_ok=True)
    for number in range(48):
        image, mask = picture(rng)
        image.save(HERE / "data" / "images" / f"{number:03}.png")
        mask.save(HERE / "data" / "masks" / f"{number:03}.png")


if __name__ == "__main__":
    main()
