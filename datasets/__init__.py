"""Where batches come from: pictures, arrays, idx files, or a user's own function.

source = open_source("images", "photos", inputs=[InputSpec("x", (None, 3, 224, 224), "float32")],
                     preprocess=Preprocess(resize=256, crop=224), take=256)
for batch in source:
    session.run(None, dict(batch.feeds))
"""

if __name__ != "trtune.datasets":
    raise ImportError(f"{__name__!r} was found through the repository root: use trtune.datasets")

from trtune.datasets.arrays import ArraySource, load_arrays
from trtune.datasets.batches import (
    Batch,
    BatchSource,
    InputSpec,
    batch_size,
    check_labels,
    fit_batch,
    labels_of,
    rebatch,
    require_labels,
    take_rows,
)
from trtune.datasets.code import load_function
from trtune.datasets.idx import dump_idx, load_idx, read_idx
from trtune.datasets.open import open_source
from trtune.datasets.pictures.images import ImageSource, list_pictures
from trtune.datasets.pictures.prefetch import map_ahead, prefetched
from trtune.datasets.pictures.preprocess import Preprocess, prepare, prepare_pictures
from trtune.datasets.python import PythonSource
from trtune.datasets.selection import Selection

__all__ = [
    "ArraySource",
    "Batch",
    "BatchSource",
    "ImageSource",
    "InputSpec",
    "Preprocess",
    "PythonSource",
    "Selection",
    "batch_size",
    "check_labels",
    "dump_idx",
    "fit_batch",
    "labels_of",
    "list_pictures",
    "load_arrays",
    "load_function",
    "load_idx",
    "map_ahead",
    "open_source",
    "prefetched",
    "prepare",
    "prepare_pictures",
    "read_idx",
    "rebatch",
    "require_labels",
    "take_rows",
]
