"""Makes the model and its data in the forms that training code has them: no training.

Coloured squares on noise as a data set of Hugging Face on disk (where `datasets` is installed), and
as numbered PNG files with a list, which the torch data set of loaders.py reads; a network of two
convolutions that tells the colour. Run: python examples/loaders/make.py
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

HERE = Path(__file__).resolve().parent
SIZE, COLOURS, COUNT = 24, 3, 160


def network() -> onnx.ModelProto:
    """Colour differences, lit pixels averaged over the picture, one class a colour."""
    mix = np.full((COLOURS, 3, 1, 1), -0.5, np.float32)
    mix[np.arange(COLOURS), np.arange(3)] = 1.0
    sharp = np.eye(COLOURS, dtype=np.float32)[:, :, None, None] * 4
    nodes = [
        helper.make_node("Conv", ["pixels", "mix"], ["colour"], name="colour"),
        helper.make_node("Relu", ["colour"], ["lit"], name="lit"),
        helper.make_node("GlobalAveragePool", ["lit"], ["mean"], name="mean"),
        helper.make_node("Conv", ["mean", "sharp"], ["scores"], name="scores"),
        helper.make_node("Flatten", ["scores"], ["logits"], name="logits"),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", COLOURS])],
        [numpy_helper.from_array(v, name) for name, v in {"mix": mix, "sharp": sharp}.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def picture(rng: np.random.Generator, kind: int) -> NDArray[np.uint8]:
    """Noise with a square of one colour, height x width x 3."""
    pixels = rng.integers(30, 110, (SIZE, SIZE, 3)).astype(np.uint8)
    side = int(rng.integers(4, 12))
    top, left = rng.integers(0, SIZE - side, 2)
    pixels[top : top + side, left : left + side, kind] = rng.integers(180, 255)
    return pixels


def main() -> None:
    """Write colours.onnx, pictures/ with list.txt, and huggingface/ beside this file."""
    rng = np.random.default_rng(0)
    onnx.save(network(), HERE / "colours.onnx")
    kinds = [int(kind) for kind in rng.integers(0, COLOURS, COUNT)]
    pictures = [picture(rng, kind) for kind in kinds]
    (HERE / "pictures").mkdir(exist_ok=True)
    names = [f"{number:03}.png" for number in range(COUNT)]
    for name, pixels in zip(names, pictures, strict=True):
        Image.fromarray(pixels).save(HERE / "pictures" / name)
    lines = [f"{name} {kind}\n" for name, kind in zip(names, kinds, strict=True)]
    (HERE / "pictures" / "list.txt").write_text("".join(lines))
    found = find_spec("datasets")
    if found is not None and found.origin is not None:  # no folder that happens to be called so
        import datasets  # noqa: TID251  (Hugging Face's)

        rows = {"image": [Image.fromarray(pixels) for pixels in pictures], "label": kinds}
        datasets.Dataset.from_dict(rows).save_to_disk(HERE / "huggingface")


if __name__ == "__main__":
    main()
