"""trtune: quantization and precision-tuning workbench for NVIDIA TensorRT.

Everything the command line does is one call here:

    import trtune

    config = trtune.load_config("mobilenetv2.yaml", overrides=["calibration.method=auto"])
    record = trtune.run(config)                    # all stages; a RunRecord, as in run.json
    print(record.status, [(v.name, v.backend, v.value) for v in record.variants])

    table = trtune.calibrate(config)               # stage by stage, each reusing what is there
    infos = trtune.build(config, backend="onnxruntime/emulate")
    rows = trtune.compare(config)                  # one row a layer, as in layers.csv
    record = trtune.tune(config)
    records = trtune.report([trtune.run_folder(config)])
    trtune.layers_frame(rows).nsmallest(5, "alone_sqnr_db")    # tables as pandas has them
    trtune.result_frame(record)

    print(trtune.inspect("model.onnx").problems)
    trtune.init_config("model.onnx", "model.yaml")
    trtune.convert_cache("old.cache", "10.14.1", "new.cache")
    trtune.migrate("model.onnx", "old.cache", "migrated", pins="layers.txt")
    trtune.strip_qdq("qat.onnx", "fp32.onnx", "qat.cache")
    print(trtune.diagnose()["onnxruntime/emulate"].usable)

What a user can do something about is raised as a `TrtuneError`. Nothing is imported before it is
asked for, so that `import trtune` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trtune.configs.system.lazy import lazy_names

if TYPE_CHECKING:
    from trtune.calibrate.table import CalibrationTable
    from trtune.configs.errors import (
        CacheError,
        ConfigError,
        DataError,
        InputError,
        ModelError,
        TrtuneError,
    )
    from trtune.configs.load import json_schema, load_config
    from trtune.configs.progress import Progress
    from trtune.configs.schema import Config
    from trtune.doctor import diagnose
    from trtune.precision.quantized.describe import Inspection
    from trtune.precision.runtime.api import BuildInfo
    from trtune.reports.record import LayerRow, RunRecord
    from trtune.reports.tables import layers_frame, result_frame
    from trtune.run.pipeline import build, calibrate, compare, report, run, run_folder, tune
    from trtune.tools import (
        cache_from_qdq,
        convert_cache,
        init_config,
        insert_qdq,
        inspect,
        inspect_engine,
        migrate,
        strip_qdq,
    )

__version__ = "0.1.0"

_STAGES = ("calibrate", "run")

__all__ = [
    "BuildInfo",
    "CacheError",
    "CalibrationTable",
    "Config",
    "ConfigError",
    "DataError",
    "InputError",
    "Inspection",
    "LayerRow",
    "ModelError",
    "Progress",
    "RunRecord",
    "TrtuneError",
    "__version__",
    "build",
    "cache_from_qdq",
    "calibrate",
    "compare",
    "convert_cache",
    "diagnose",
    "init_config",
    "insert_qdq",
    "inspect",
    "inspect_engine",
    "json_schema",
    "layers_frame",
    "load_config",
    "migrate",
    "report",
    "result_frame",
    "run",
    "run_folder",
    "strip_qdq",
    "tune",
]

_named, __dir__ = lazy_names(
    __name__,
    {
        "calibrate.table": "CalibrationTable",
        "configs.errors": "CacheError ConfigError DataError InputError ModelError TrtuneError",
        "configs.load": "json_schema load_config",
        "configs.progress": "Progress",
        "configs.schema": "Config",
        "doctor": "diagnose",
        "precision.quantized.describe": "Inspection",
        "precision.runtime.api": "BuildInfo",
        "reports.record": "LayerRow RunRecord",
        "reports.tables": "layers_frame result_frame",
        "run.pipeline": "build compare report run_folder tune",
        "tools": (
            "cache_from_qdq convert_cache init_config insert_qdq "
            "inspect inspect_engine migrate strip_qdq"
        ),
    },
)


def __getattr__(name: str) -> Any:
    return importlib.import_module(f"trtune.{name}") if name in _STAGES else _named(name)


class _Stage(ModuleType):
    """A package that is a stage too: `trtune.calibrate(config)`, `trtune.run(config)`."""

    def __call__(self, config: Config, **options: Any) -> Any:
        """The stage of the package's name: see `trtune.run.pipeline`."""
        pipeline = importlib.import_module("trtune.run.pipeline")
        return getattr(pipeline, self.__name__.rpartition(".")[2])(config, **options)


class _Root(ModuleType):
    """This package. Importing a submodule sets it as an attribute here: that is the moment at which
    `calibrate` and `run`, each a folder and a stage, become both."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _STAGES and isinstance(value, ModuleType):
            value.__class__ = _Stage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Root
