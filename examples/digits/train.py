"""Train the example's network and write digits.onnx; the only file here that needs torch.

    pip install -e '.[train]'
    python examples/digits/train.py

A MobileNet of 12 thousand parameters for the 8 x 8 digits: a stem, six depthwise-separable blocks
with SiLU, a global average pool and a linear layer. The pixels are standardized in the graph, each
by its own mean and deviation, which is what scikit-learn's examples do to this data set
(StandardScaler). README.md says what that does to INT8, and how the seed was chosen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from prepare import Digits, split_digits
from torch import Tensor, nn

OPSET = 17
EPOCHS = 40
BATCH = 64
PEAK_RATE = 0.02
SEED = 2


class Standardize(nn.Module):
    """(x - mean) / deviation, pixel by pixel; a pixel that never varies is divided by one."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        deviation = images.std(0, keepdim=True, correction=0)
        self.register_buffer("mean", images.mean(0, keepdim=True))
        self.register_buffer("factor", 1 / torch.where(deviation == 0, 1.0, deviation))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.factor


class ConvNormAct(nn.Module):
    """Convolution, batch norm (folded into the convolution by the export), SiLU."""

    def __init__(
        self, inputs: int, outputs: int, *, size: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Separable(nn.Sequential):
    """A depthwise 3 x 3 convolution and a pointwise one."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = ConvNormAct(inputs, inputs, size=3, stride=stride, groups=inputs)
        self.pointwise = ConvNormAct(inputs, outputs)


class DigitNet(nn.Module):
    """N x 1 x 8 x 8 pixels from 0 to 16 -> N x 10 logits."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.standardize = Standardize(images)
        self.stem = ConvNormAct(1, 12, size=3, stride=2)
        self.blocks = nn.Sequential(
            Separable(12, 12),
            Separable(12, 24),
            Separable(24, 24, stride=2),
            Separable(24, 48),
            Separable(48, 48, stride=2),
            Separable(48, 96),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(self.standardize(x)))
        return self.classifier(self.pool(x).flatten(1))


def train(digits: Digits, *, seed: int, epochs: int = EPOCHS) -> DigitNet:
    """Adam with one warm-up and decay, no augmentation, no weight decay; the last epoch counts."""
    torch.manual_seed(seed)
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.labels)
    net = DigitNet(images)
    steps = len(labels) // BATCH
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=epochs * steps)
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels))
        for rows in order[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def export(net: DigitNet, path: Path) -> None:
    """Write `net` as ONNX: one input `input`, one output `logits`, a free first axis `N`."""
    torch.onnx.export(
        net,
        (torch.zeros(2, 1, 8, 8),),
        path,
        opset_version=OPSET,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
        dynamo=False,  # this exporter folds batch norm and names nodes after the modules
    )
    onnx.checker.check_model(onnx.load(path), full_check=True)


def top1(path: Path, digits: Digits) -> float:
    """Share of `digits` that the ONNX file at `path` gets right."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input": digits.images})
    return float(np.mean(np.argmax(logits, axis=1) == digits.labels))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the digits network and write its ONNX.")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "digits.onnx")
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order: the same processor gives the same file
    torch.use_deterministic_algorithms(True)
    training, test = split_digits()
    export(train(training, seed=options.seed), options.out)
    print(
        f"{options.out}: seed {options.seed}, FP32 top-1 {top1(options.out, test):.4f} on the test"
    )


if __name__ == "__main__":
    main()
