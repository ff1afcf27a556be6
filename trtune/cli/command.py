"""How a command is declared: with its own arguments; those that all commands have are added.

    @command(epilog="Example: trtune calibrate model.yaml")
    def calibrate(terminal: Terminal, given: Given) -> None: ...

takes CONFIG, --set, --out, --device, --verbose and --json, and works inside a `session`.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from trtune.cli.console import session

if TYPE_CHECKING:
    from trtune.configs.schema import Config

SETTINGS = {"help_option_names": ["-h", "--help"]}
STATUSES = (
    "Exit status: 0 done and target met, 3 done but target missed, 2 the input is wrong, "
    "1 anything else, 130 interrupted."
)
RUNS = Path("runs")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file.")]
ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a key of the config: a.b=value. Repeatable."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where networks run, as runtime.device: auto, cpu, cuda or cuda:N.",
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


@dataclass(frozen=True, slots=True)
class Given:
    """The config that a command works on, as the command line names it."""

    command: str
    path: Path
    overrides: tuple[str, ...] = ()
    out: Path = RUNS

    def load(self) -> Config:
        """The config; raises ConfigError for one that is wrong, or for a model in its place."""
        from trtune.configs.errors import ConfigError
        from trtune.configs.load import load_config

        if self.path.suffix.lower() == ".onnx":
            model, config = shlex.quote(str(self.path)), f"{self.path.stem}.yaml"
            first = "" if Path(config).is_file() else f"`trtune init {model}` writes one, "
            raise ConfigError(
                f"{self.path} is a model, and this command takes a config; "
                f"{first}then: trtune {self.command} {shlex.quote(config)}"
            )
        return load_config(self.path, overrides=self.overrides)

    def words(self) -> str:
        """What to type to have the same done again."""
        words = ["trtune", self.command, str(self.path)]
        for override in self.overrides:
            words += ["--set", override]
        return shlex.join(words if self.out == RUNS else [*words, "--out", str(self.out)])


def _shared(
    name: str, annotation: Any, default: Any = inspect.Parameter.empty
) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


OF_ALL = (_shared("verbose", Verbose, False), _shared("as_json", Json, False))
OF_A_CONFIG = (
    _shared("config", ConfigFile),
    _shared("overrides", Overrides, None),
    _shared("out", Out, RUNS),
    _shared("device", Device, None),
)
Work = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its name, what typer calls, and what stands below its help."""

    name: str
    callback: Callable[..., None]
    epilog: str | None

    def add_to(self, app: typer.Typer, panel: str | None = None) -> None:
        """Make it a command of `app`; `panel` is the heading in `--help` below which it stands."""
        app.command(self.name, epilog=self.epilog, rich_help_panel=panel)(self.callback)


def command(*, name: str | None = None, epilog: str | None = None) -> Callable[[Work], Command]:
    """Make a function a command, called as `name` or else as the function.

    The function's first argument is the `Terminal` of the session in which it runs. One annotated
    `Given` stands for CONFIG, `--set`, `--out` and `--device`; every other one is the command's
    own, annotated for typer.
    """
    return lambda work: Command(name or work.__name__, _called_by_typer(work), epilog)


def _called_by_typer(work: Work) -> Callable[..., None]:
    """`work` with the arguments that typer is to read from the command line."""
    hints = get_type_hints(work, include_extras=True)
    _, *own = inspect.signature(work).parameters.values()
    given = next((p.name for p in own if hints[p.name] is Given), None)
    ours = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[p.name])
        for p in own
        if p.name != given
    ]

    def called(**values: Any) -> None:
        verbose, as_json = values.pop("verbose"), values.pop("as_json")
        if given is not None:
            overrides = tuple(values.pop("overrides") or ())
            device = values.pop("device")
            overrides += () if device is None else (f"runtime.device={device}",)
            values[given] = Given(work.__name__, values.pop("config"), overrides, values.pop("out"))
        with session(verbose=verbose, as_json=as_json, resumes=given is not None) as terminal:
            work(terminal, **values)

    if given is None:
        parameters = [*ours, *OF_ALL]
    else:
        parameters = [OF_A_CONFIG[0], *ours, *OF_A_CONFIG[1:], *OF_ALL]
    # a line end of the source is none of the help's: rich would keep it
    called.__name__, called.__doc__ = work.__name__, " ".join((work.__doc__ or "").split())
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    vars(called)["__signature__"] = inspect.Signature(parameters)
    return called
