"""Batches to histograms to amax to a table of scales; TensorRT's calibration caches.

from trtune.calibrate.collect import collect
from trtune.calibrate.outliers import dominant, outliers

found = collect(model, ["conv1_out", "relu1_out"], source)
table = CalibrationTable.from_amax(choose(found.histograms, "entropy"))
save_table(Path("calibration.cache"), table)
dominant(outliers(found.histograms))   # the pictures that set the range of many tensors

The names below are imported when they are first used: what compiles histograms takes a while.
`collect` and `outliers` are modules, named like the function that each is for.
"""

if __name__ != "trtune.calibrate":
    raise ImportError(f"{__name__!r} was found through the repository root: use trtune.calibrate")

from typing import TYPE_CHECKING

from trtune.configs.system.lazy import lazy_names

if TYPE_CHECKING:
    from trtune.calibrate.cache import (
        Cache,
        CacheDifference,
        convert,
        diff,
        dump_cache,
        load_table,
        parse_cache,
        read_cache,
        save_table,
    )
    from trtune.calibrate.collect import Collection
    from trtune.calibrate.histogram import Histogram, PictureMaxima
    from trtune.calibrate.methods import AMAX_METHODS, CANDIDATES, choose
    from trtune.calibrate.outliers import DominantPicture, Outlier, dominant
    from trtune.calibrate.table import CalibrationTable, MissingScaleError

__all__ = [
    "AMAX_METHODS",
    "CANDIDATES",
    "Cache",
    "CacheDifference",
    "CalibrationTable",
    "Collection",
    "DominantPicture",
    "Histogram",
    "MissingScaleError",
    "Outlier",
    "PictureMaxima",
    "choose",
    "convert",
    "diff",
    "dominant",
    "dump_cache",
    "load_table",
    "parse_cache",
    "read_cache",
    "save_table",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "cache": (
            "Cache CacheDifference convert diff "
            "dump_cache load_table parse_cache read_cache save_table"
        ),
        "collect": "Collection",
        "histogram": "Histogram PictureMaxima",
        "methods": "AMAX_METHODS CANDIDATES choose",
        "outliers": "DominantPicture Outlier dominant",
        "table": "CalibrationTable MissingScaleError",
    },
)
