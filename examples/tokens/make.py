"""Makes a language model of 64 tokens and sequences for it: a bigram table, no training.

Run: python examples/tokens/make.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).resolve().parent
TOKENS, WIDTH, LENGTH = 64, 48, 32


def bigrams(rng: np.random.Generator) -> NDArray[np.float64]:
    """The log-probability of each token behind each: a few likely ones."""
    logits = rng.normal(0, 2, (TOKENS, TOKENS))
    found: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found


def network(table: NDArray[np.float64]) -> onnx.ModelProto:
    """Embedding and head by the table's singular vectors, so that two MatMuls give it back."""
    left, sizes, right = np.linalg.svd(table)
    root = np.sqrt(sizes[:WIDTH])
    values = {
        "embedding": (left[:, :WIDTH] * root).astype(np.float32),
        "turn": np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0],
    }
    values["head"] = values["turn"].T @ (root[:, None] * right[:WIDTH])
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["embedded"], name="embedded"),
        helper.make_node("MatMul", ["embedded", "turn"], ["hidden"], name="hidden"),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"], name="logits"),
    ]
    graph = helper.make_graph(
        nodes,
        "tokens",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", TOKENS])],
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def main() -> None:
    """Write tokens.onnx and tokens.npz beside this file."""
    rng = np.random.default_rng(0)
    table = bigrams(rng)
    onnx.save(network(table), HERE / "tokens.onnx")
    rows = np.empty((96, LENGTH), np.int64)
    rows[:, 0] = rng.integers(0, TOKENS, 96)
    for place in range(1, LENGTH):
        odds = np.exp(table[rows[:, place - 1]])
        rows[:, place] = (odds.cumsum(axis=1) < rng.random((96, 1))).sum(axis=1).clip(0, TOKENS - 1)
    np.savez(HERE / "tokens.npz", input_ids=rows)


if __name__ == "__main__":
    main()
