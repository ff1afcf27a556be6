"""The YAML language of a config: schema, loading, errors, presets.

config = load_config("model.yaml", overrides=["calibration.method=max"])

The names below are imported when they are first used: the schema takes a while.
"""

if __name__ != "trtune.configs":
    raise ImportError(f"{__name__!r} was found through the repository root: use trtune.configs")

from typing import TYPE_CHECKING

from trtune.configs.system.lazy import lazy_names

if TYPE_CHECKING:
    from trtune.configs.errors import (
        CacheError,
        ConfigError,
        DataError,
        InputError,
        ModelError,
        TrtuneError,
    )
    from trtune.configs.load import check_files, dump_config, json_schema, load_config, presets
    from trtune.configs.progress import Progress, silent
    from trtune.configs.schema import Config
    from trtune.configs.template import init_text

__all__ = [
    "CacheError",
    "Config",
    "ConfigError",
    "DataError",
    "InputError",
    "ModelError",
    "Progress",
    "TrtuneError",
    "check_files",
    "dump_config",
    "init_text",
    "json_schema",
    "load_config",
    "presets",
    "silent",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "errors": "CacheError ConfigError DataError InputError ModelError TrtuneError",
        "load": "check_files dump_config json_schema load_config presets",
        "progress": "Progress silent",
        "schema": "Config",
        "template": "init_text",
    },
)
