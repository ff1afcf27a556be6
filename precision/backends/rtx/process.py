"""The parent's side of a TensorRT-RTX build: start the process, wait, and say how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trtune.configs.errors import ModelError, TrtuneError
from trtune.configs.files import write_json
from trtune.precision.backends.rtx.child import Answer, Request

CHILD = "trtune.precision.backends.rtx.child"
ADVICE = (
    "; it ran out of memory: set a smaller `workspace` for this backend, a smaller max in "
    "model.shapes, or build where there is more"
)


class BuildError(TrtuneError):
    """The compiler gave no engine; `problems` are its error messages."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


def build_in_child(request: Request, work: Path, *, timeout: float, opset: int) -> None:
    """Run one build in a process and a process group of its own, which never outlives this call.

    `work` is a folder for the request and what the process says. `opset` is that of the model, for
    the message.

    Raises ModelError for a model that cannot be parsed, BuildError if the compiler refuses,
    TrtuneError for a build that takes longer than `timeout` seconds or dies.
    """
    asked, said = work / "request.json", work / "stderr.txt"
    write_json(asked, asdict(request))
    status = _run([sys.executable, "-m", CHILD, str(asked)], work, said, timeout)
    answer = _read_answer(Path(request.answer))
    if answer is None:
        raise TrtuneError(_death(status, said, Path(request.log)))
    if answer.stage != "done":
        raise _failure(answer, opset)


def _run(command: Sequence[str], work: Path, said: Path, timeout: float) -> int:
    """The exit status of `command`, run in `work` with our import path."""
    with said.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=work,
            env=_environment(),
            stdin=subprocess.PIPE,  # closes when this process dies, and the child then exits
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TrtuneError(
                f"TensorRT-RTX was stopped after {timeout:g} s without an engine. Its last words: "
                f"{_tail(work)}. A lower optimization_level builds faster"
            ) from None
        finally:
            _end(process)


def _environment() -> dict[str, str]:
    """Ours, with the import path that this process has, wherever the child runs."""
    paths = dict.fromkeys(os.path.abspath(entry or ".") for entry in sys.path)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def why_not_loaded() -> str:
    """What goes wrong when tensorrt_rtx is imported, in another process; empty if nothing does."""
    command = [sys.executable, "-c", "import tensorrt_rtx"]
    try:
        done = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return last[0] if done.returncode else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process and its group, and wait for it."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _read_answer(path: Path) -> Answer | None:
    try:
        return Answer(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _death(status: int, said: Path, log: Path) -> str:
    """What became of a process that gave no answer."""
    how = f"with status {status}"
    if status < 0:
        try:
            how = f"by {signal.Signals(-status).name}"
        except ValueError:
            how = f"by signal {-status}"
    text = f"the TensorRT-RTX build died {how}. Its last words: {_tail(said.parent, log)}"
    # Minus SIGKILL, which Windows does not have: how Linux ends who takes too much memory.
    out_of_memory = status == -9 or "MemoryError" in text or "bad_alloc" in text
    return text + (ADVICE if out_of_memory else "")


def _tail(work: Path, log: Path | None = None, *, most: int = 600) -> str:
    """The end of what the process wrote to its streams, else of the compiler's log."""
    for path in (work / "stderr.txt", log or work / "build.log"):
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - most))
                words = file.read().decode("utf-8", errors="replace").strip()
        except OSError:
            continue
        if words:
            return words
    return "(nothing)"


def _failure(answer: Answer, opset: int) -> TrtuneError:
    """The error for an answer that is not an engine."""
    named = f"TensorRT-RTX {answer.version}"
    if answer.stage == "import":
        return TrtuneError(
            f"tensorrt_rtx is installed but cannot be loaded: {answer.problems[0]}; "
            "pip install --force-reinstall 'trtune[rtx]'"
        )
    if answer.stage == "model":
        shown = "; ".join(answer.problems[:3])
        return TrtuneError(f"the Q/DQ model is not what {named} needs: {shown}")
    if answer.stage == "parse":
        return ModelError(
            f"{named} cannot parse {_parser_words(answer.problems, opset)}; replace the operator "
            "in the export, or leave this backend out"
        )
    problems = [" ".join(str(problem).split()) for problem in answer.problems]
    text = f"{named} gave no engine: {'; '.join(problems)[:1500]}"
    return BuildError(text + (ADVICE if "memory" in text.lower() else ""), problems)


def _parser_words(problems: Sequence[Any], opset: int) -> str:
    shown = [
        f"node {p['node']!r} (operator {p['op']}, opset {opset}): {p['code']}: {p['text']}"
        for p in problems[:3]
    ]
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ("; ".join(shown) or "the model, and gives no reason") + more
