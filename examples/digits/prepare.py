"""Write the example's pictures: data/calibration.npz and data/test.npz beside this file.

scikit-learn's bundled handwritten digits: 1797 grey pictures of 8 x 8 pixels from 0 to 16. 797 of
them test; the other 1000 train the network (train.py splits with this same code) and calibrate it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

FOLDER = Path(__file__).parent / "data"
TEST_PICTURES = 797
SPLIT_SEED = 0


class Digits(NamedTuple):
    """`images`: float32, N x 1 x 8 x 8, values 0 to 16; `labels`: int64, N digits."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


def split_digits() -> tuple[Digits, Digits]:
    """The 1000 pictures to train and calibrate with, and the 797 to test with, stratified."""
    pixels, digits = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 1, 8, 8).astype(np.float32)
    labels = digits.astype(np.int64)
    rows: list[NDArray[Any]] = train_test_split(
        np.arange(len(labels)), test_size=TEST_PICTURES, stratify=labels, random_state=SPLIT_SEED
    )
    train, test = (Digits(images[part], labels[part]) for part in rows)
    return train, test


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, digits in zip(("calibration", "test"), split_digits(), strict=True):
        unfinished = FOLDER / f"{name}.unfinished.npz"
        np.savez(unfinished, images=digits.images, labels=digits.labels)
        unfinished.replace(FOLDER / f"{name}.npz")
        print(f"{len(digits.labels):5d} pictures in {FOLDER / name}.npz")


if __name__ == "__main__":
    main()
