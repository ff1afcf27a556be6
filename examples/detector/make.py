"""Makes the detector and its YOLO-format pictures: coloured rectangles on noise, no training.

The network is what a trained one would amount to: a colour filter a class, blurred at stride 8,
with YOLOv8's output N x (4 + C) x A. Run: python examples/detector/make.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

HERE = Path(__file__).resolve().parent
SIZE, CELL, CLASSES = 128, 16, ("red", "green", "blue")
GRID = SIZE // CELL


def network() -> onnx.ModelProto:
    """Colour differences, their mean a cell, a sharp sigmoid; a box of fixed size at each cell."""
    mix = np.full((3, 3, 1, 1), -1.0, np.float32)
    mix[np.arange(3), np.arange(3)] = 1.0
    blur = np.full((3, 1, CELL, CELL), 1 / CELL**2, np.float32)
    centres = (np.arange(GRID, dtype=np.float32) + 0.5) * CELL
    ys, xs = np.meshgrid(centres, centres, indexing="ij")
    boxes = np.stack(
        [xs.ravel(), ys.ravel(), np.full(GRID**2, 2 * CELL), np.full(GRID**2, 2 * CELL)]
    )
    near = np.ones((3, 1, 2, 2), np.float32) / 4
    nodes = [
        helper.make_node("Conv", ["images", "mix"], ["colour"], name="colour"),
        helper.make_node("Relu", ["colour"], ["lit"], name="lit"),
        helper.make_node("Conv", ["lit", "blur"], ["cells"], name="cells", group=3,
                         kernel_shape=[CELL, CELL], strides=[CELL, CELL]),
        helper.make_node("Conv", ["cells", "near", "bias"], ["logits"], name="logits", group=3,
                         kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
        helper.make_node("Mul", ["logits", "sharp"], ["scaled"], name="scaled"),
        helper.make_node("Sigmoid", ["scaled"], ["scores"], name="scores"),
        helper.make_node("Reshape", ["scores", "flat"], ["rows"], name="rows"),
        helper.make_node("Concat", ["boxes", "rows"], ["output"], name="output", axis=1),
    ]  # fmt: skip
    boxes[:2] += CELL / 2  # two cells to a side: the box stands around their common corner
    values = {"mix": mix, "blur": blur, "near": near, "bias": np.full(3, -0.45, np.float32),
              "sharp": np.float32(24), "flat": np.array([1, 3, GRID**2], np.int64),
              "boxes": boxes[None].astype(np.float32)}  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 7, GRID**2])],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def picture(rng: np.random.Generator) -> tuple[Image.Image, list[str]]:
    """A picture of 192 x 128 with one to three rectangles, and its label lines."""
    pixels = rng.integers(40, 90, (128, 192, 3)).astype(np.uint8)
    lines = []
    for place in rng.permutation(6)[: rng.integers(1, 4)]:
        kind = int(rng.integers(0, 3))
        side = int(rng.integers(40, 52))
        left = (place % 3) * 60 + int(rng.integers(4, 10))
        top = (place // 3) * 60 + int(rng.integers(4, 10))
        pixels[top : top + side, left : left + side] = 50
        pixels[top : top + side, left : left + side, kind] = rng.integers(190, 250)
        lines.append(f"{kind} {(left + side / 2) / 192} {(top + side / 2) / 128} "
                     f"{side / 192} {side / 128}")  # fmt: skip
    return Image.fromarray(pixels), lines


def main() -> None:
    """Write detector.onnx and data/ beside this file."""
    rng = np.random.default_rng(0)
    onnx.save(network(), HERE / "detector.onnx")
    for split, count in (("train", 24), ("val", 32)):
        for kind in ("images", "labels"):
            (HERE / "data" / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, lines = picture(rng)
            image.save(HERE / "data" / "images" / split / f"{number:03}.png")
            label = HERE / "data" / "labels" / split / f"{number:03}.txt"
            label.write_text("\n".join(lines) + "\n")
    names = "\n".join(f"  {number}: {name}" for number, name in enumerate(CLASSES))
    text = f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}\n"
    (HERE / "data" / "data.yaml").write_text(text)


if __name__ == "__main__":
    main()
