"""Rewrites that cost something in TensorRT-RTX are dropped before anything is tuned on them."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import tinymodels
from tinyproject import config_of, write_project
from tinyquant import uneven

from trtune.configs.errors import TrtuneError
from trtune.precision.backends.rtx import moves
from trtune.precision.backends.rtx.backend import RtxBackend
from trtune.precision.backends.rtx.moves import Listed
from trtune.precision.runtime.api import Candidate
from trtune.precision.tune.prepared import MoveCosts
from trtune.run.pipeline import run
from trtune.run.record import cost_notes

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)

RTX = (
    "calibration.prepare=[scale, shift]",
    "backends=[{name: onnxruntime}, {name: tensorrt_rtx, compute_capabilities: ['8.9']}]",
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_project(tmp_path, uneven(tinymodels.silu_se()), calibration=48)


def test_the_compilers_account_is_asked_and_said(project: Path) -> None:
    record = run(config_of(project, *RTX))
    assert "scale" in {move for moves in record.prepared.values() for move in moves}
    said = [note for note in record.notes if "with the rewrites that stay as nodes" in note]
    assert len(said) == 1
    assert not any("not rewritten" in note for note in record.notes)


def test_what_costs_a_kernel_is_dropped_and_said(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engines are real; in the account of the first with rewrites one has its own kernel."""
    real, asked = moves.kernel_list, list[Candidate]()
    kernel = moves.Kernel("__myl_Mul", "kgen", (), (), (), ("stem_silu/scaled/Mul",))

    def worse(candidate: Candidate, backend: RtxBackend, folder: Path) -> Listed:
        found = real(candidate, backend, folder)
        asked.append(candidate)
        names = {node.name for node in candidate.model.proto.graph.node}
        bad = any(name in names for name in kernel.nodes)
        return replace(found, kernels=(*found.kernels, kernel)) if bad else found

    monkeypatch.setattr(moves, "kernel_list", worse)
    config = config_of(project, *RTX)
    record = run(config)
    assert any(
        note.startswith("stem_silu: not rewritten, for what it costs in TensorRT-RTX: kernel __myl")
        for note in record.notes
    )
    assert "stem_silu" not in record.prepared
    assert 2 <= len(asked) <= 4

    def never(*args: object) -> Listed:
        raise AssertionError("asked again")

    monkeypatch.setattr(moves, "kernel_list", never)
    assert run(config).prepared == record.prepared


def test_what_cannot_be_built_says_why_nothing_is_known(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> Listed:
        raise TrtuneError("out of memory")

    monkeypatch.setattr(moves, "kernel_list", broken)
    notes = run(config_of(project, *RTX)).notes
    assert any(n.startswith("what rewrites cost in TensorRT-RTX is not known") for n in notes)


@pytest.mark.parametrize(
    ("costs", "lines"),
    [
        (MoveCosts(), []),
        (MoveCosts(kernels=(9, 9)), ["TensorRT-RTX has 9 kernels with the rewrites that stay as "
                                     "nodes, 9 without, and no planned node less in INT8"]),
        (MoveCosts({"x": "kernel k (kgen) is added"}),
         ["x: not rewritten, for what it costs in TensorRT-RTX: kernel k (kgen) is added"]),
        (MoveCosts(unknown="no GPU"), ["what rewrites cost in TensorRT-RTX is not known: no GPU"]),
    ],
)  # fmt: skip
def test_the_words(costs: MoveCosts, lines: list[str]) -> None:
    assert cost_notes(costs) == lines
