"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SETTINGS = {"help_option_names": ["-h", "--help"]}

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file.")]
ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a key of the config: a.b=value. Repeatable."
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where run folders go.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say what is done; show tracebacks of bugs.")
]
Json = Annotated[
    bool, typer.Option("--json", help="The result as JSON on stdout, all else on stderr.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")]
