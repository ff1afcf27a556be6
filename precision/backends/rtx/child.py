"""One TensorRT-RTX build in a process of its own: `python -m trtune.precision.backends.rtx.child`.

After a build that failed, the next one in the same process may come out all in float without a
word, so each has its own. The one argument is a request as JSON; the answer is a JSON file too,
written last, so that a process that died has given none.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import onnx

from trtune.configs.files import write_bytes, write_json

FAILED = 3
"""Exit status of a build that failed for a reason that the answer names."""
QUANTIZING = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True, slots=True)
class Request:
    """What to build: all paths absolute; `profiles` has min, opt and max of each dynamic input.

    `workspace` is in bytes; None leaves it, and `optimization_level`, to the compiler. `as_it_is`
    says that the model is a user's own, whose scales are not this package's to check.
    """

    model: str
    plan: str
    log: str
    answer: str
    compute_capabilities: Sequence[str]
    profiles: Mapping[str, Mapping[str, Sequence[int]]]
    workspace: int | None = None
    optimization_level: int | None = None
    tf32: bool = False
    as_it_is: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """How it went: `stage` is where it ended (import, model, parse, build, done).

    `problems` is what failed, in the words of whoever says so; for `parse` a problem has the keys
    node, op, code and text.
    """

    stage: str
    version: str = ""
    problems: Sequence[Any] = field(default_factory=tuple)


def main(arguments: Sequence[str]) -> int:
    """Do what the request file says; the exit status is 0 or `FAILED`."""
    _end_with_parent()
    request = Request(**json.loads(Path(arguments[0]).read_text("utf-8")))
    answer = build_engine(request)
    write_json(Path(request.answer), asdict(answer))
    return 0 if answer.stage == "done" else FAILED


def _end_with_parent() -> None:
    """Exit when the other end of stdin closes: whoever started this is gone, however it went."""

    def watch() -> None:
        os.read(0, 1)
        os._exit(FAILED)

    threading.Thread(target=watch, daemon=True).start()


def build_engine(request: Request) -> Answer:
    """Build, and say how it went; the log is written as it comes."""
    try:
        trt = importlib.import_module("tensorrt_rtx")
    except (ImportError, OSError) as error:
        return Answer("import", problems=(str(error),))
    model = onnx.load(request.model, load_external_data=False)
    problems = () if request.as_it_is else scale_problems(model)
    if problems:
        return Answer("model", trt.__version__, problems)
    with open(request.log, "w", encoding="utf-8") as stream:
        return _build(trt, request, stream)


def scale_problems(model: onnx.ModelProto) -> tuple[str, ...]:
    """What is wrong with the scales of activations: each must be a 0-d constant.

    One of shape [1] passes every check, and the compiler then computes everything in float.
    """
    constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    problems = []
    for node in model.graph.node:
        if node.op_type not in QUANTIZING or node.input[0] in constants:
            continue
        dims = constants.get(node.input[1])
        if dims is None:
            problems.append(f"{node.name!r}: its scale {node.input[1]!r} is not a constant")
        elif dims:
            problems.append(
                f"{node.name!r}: its scale {node.input[1]!r} has shape {list(dims)}, not []"
            )
    return tuple(problems)


def _build(trt: Any, request: Request, stream: TextIO) -> Answer:
    logger = _make_logger(trt, stream)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request.model):
        return Answer("parse", trt.__version__, parser_problems(parser))
    unknown = [cc for cc in request.compute_capabilities if _capability(trt, cc) is None]
    if unknown:
        known = ", ".join(supported(trt))
        text = f"compute capability {', '.join(unknown)} is not supported, only {known}"
        return Answer("build", trt.__version__, (text,))
    config = _configured(trt, builder, request)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        texts = logger.errors or ["the compiler gave no plan, and no reason"]
        return Answer("build", trt.__version__, tuple(texts))
    write_bytes(Path(request.plan), bytes(plan))
    return Answer("done", trt.__version__)


def _make_logger(trt: Any, stream: TextIO) -> Any:
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Writes everything to the log, and keeps what went wrong."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            stream.write(f"[{level.name[0]}] {message}\n")
            stream.flush()
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def parser_problems(parser: Any) -> tuple[dict[str, str], ...]:
    """The parser's errors, copied: their texts do not outlive the parser."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return tuple(
        {
            "node": str(error.node_name()),
            "op": str(error.node_operator()),
            "code": str(error.code().name),
            "text": f"{error.desc()} (in {error.func()})",
        }
        for error in errors
    )


def supported(trt: Any) -> list[str]:
    """The compute capabilities that this version builds for, as "8.9"."""
    numbers = (re.fullmatch(r"SM(\d+)", name) for name in vars(trt.ComputeCapability))
    found = sorted(int(match[1]) for match in numbers if match)
    return [f"{number // 10}.{number % 10}" for number in found]


def _capability(trt: Any, name: str) -> Any:
    return getattr(trt.ComputeCapability, "SM" + name.replace(".", ""), None)


def _configured(trt: Any, builder: Any, request: Request) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(request.compute_capabilities)
    for index, name in enumerate(request.compute_capabilities):
        config.set_compute_capability(_capability(trt, name), index)
    if request.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace)
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    if not request.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if request.profiles:
        profile = builder.create_optimization_profile()
        for name, shape in request.profiles.items():
            profile.set_shape(name, shape["min"], shape["opt"], shape["max"])
        config.add_optimization_profile(profile)
    return config


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
