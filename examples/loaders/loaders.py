"""Data as training code has it, as `source: python` takes it: functions that yield dicts of arrays.

Each is called anew for every pass over the data, and yields the same again; `args` in the config
are its arguments. What it yields is a batch: the model's input by name, rows first, and `labels`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
Arrays = dict[str, Any]


def hugging_face(path: str, batch: int = 16) -> Iterator[Arrays]:
    """Batches of a data set that `save_to_disk` wrote, with the columns image and label.

    The pictures go on as uint8, N x height x width x 3: `preprocess` in the config does the rest.
    """
    from datasets import load_from_disk  # noqa: TID251  (Hugging Face's)

    for rows in load_from_disk(str(HERE / path)).iter(batch_size=batch):
        pictures = [np.asarray(image.convert("RGB")) for image in rows["image"]]
        yield {"pixels": np.stack(pictures), "labels": np.array(rows["label"])}


def torch_loader(path: str, batch: int = 16) -> Iterator[Arrays]:
    """Batches of a DataLoader: float tensors, N x 3 x height x width, preprocessed already.

    `shuffle` stays off: trtune goes through the data several times and wants the same each time.
    """
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Squares(Dataset[tuple[torch.Tensor, int]]):
        def __init__(self, folder: Path) -> None:
            lines = (folder / "list.txt").read_text().splitlines()
            self.rows = [(folder / line.split()[0], int(line.split()[1])) for line in lines]

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            file, label = self.rows[index]
            pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB")))
            return pixels.permute(2, 0, 1).float() / 255, label

    for pixels, labels in DataLoader(Squares(HERE / path), batch_size=batch, shuffle=False):
        yield {"pixels": pixels.numpy(), "labels": labels.numpy()}
