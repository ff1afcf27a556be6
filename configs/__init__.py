if __name__ != "trtune.configs":
    raise ImportError(f"{__name__!r} was found through the repository root: use trtune.configs")

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
