"""What TensorRT-RTX makes of a file as it stands: its words if it refuses, else its kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import onnx

from trtune.configs.errors import TrtuneError
from trtune.precision.backends.gpu.profiles import make_profiles
from trtune.precision.backends.rtx.child import Request
from trtune.precision.backends.rtx.elementwise import read_as_codes
from trtune.precision.backends.rtx.log import Account, accounts, read_kernels
from trtune.precision.backends.rtx.process import build_in_child
from trtune.precision.graph.proto import FreshNames, default_opset
from trtune.precision.graph.view import GraphView, Model, save_model
from trtune.precision.plan.plan import COMPUTE_OPS
from trtune.precision.runtime.api import LOG_FILE, MODEL_FILE, PLAN_FILE


@dataclass(frozen=True, slots=True)
class AsItIs:
    """A build of a file that nothing was done to: `refused` are the compiler's words if it gave no
    engine; `accounts` what each node runs in otherwise, "unknown" where that cannot be told."""

    refused: str = ""
    accounts: Mapping[str, Account] = field(default_factory=lambda: MappingProxyType({}))

    def precision(self, node: str) -> str:
        """int8, fp8, fp16, bf16, fp32 or unknown; "" for a node not in the file, and for every
        one of a file that was refused."""
        found = self.accounts.get(node)
        return found.precision if found is not None else ""


def build_as_it_is(
    model: Model,
    folder: Path,
    *,
    compute_capability: str = "8.9",
    timeout: float = 600.0,
    products: Iterable[str] = COMPUTE_OPS,
) -> AsItIs:
    """Build the file that `model` was loaded from, without folding, in `folder`, and read what came
    out.

    Of the file nothing is changed but the names of nodes, which become those of `model`: that is
    what the compiler's log is read by. `products` are the operators that multiply. Free dimensions
    besides the batch are a refusal in this package's words. Raises nothing that a file can cause.
    """
    view = GraphView.of(model)
    multiply = frozenset(node.name for node in view.nodes if node.op_type in set(products))
    try:
        profiles = make_profiles(model.inputs, {}, batch=1)
        stands = with_node_names(model)
        save_model(stands, folder / MODEL_FILE, model.path.parent)
        request = Request(
            model=str(folder / MODEL_FILE),
            plan=str(folder / PLAN_FILE),
            log=str(folder / LOG_FILE),
            answer=str(folder / "answer.json"),
            compute_capabilities=(compute_capability,),
            profiles={name: profile.to_json() for name, profile in profiles.items()},
            as_it_is=True,
        )
        build_in_child(request, folder, timeout=timeout, opset=default_opset(stands) or 0)
    except TrtuneError as error:
        return AsItIs(refused=" ".join(str(error).split()))
    kernels = read_kernels((folder / LOG_FILE).read_text("utf-8", errors="replace"))
    codes = read_as_codes(stands.graph)
    found = accounts(kernels, view.by_name, compute=multiply, elementwise=codes)
    return AsItIs(accounts=found)


def with_node_names(model: Model) -> onnx.ModelProto:
    """The file of `model` with its nodes named as they are there, and otherwise as it was read.

    Nodes that `model` has not (constants, calls of functions) keep their name unless another has
    it. A model that was never in a file gives its own graph.
    """
    if not model.path.is_file():
        return model.proto
    raw = onnx.load(model.path, load_external_data=False)
    named = {out: node.name for node in model.proto.graph.node for out in node.output if out}
    fresh = FreshNames({node.name for node in model.proto.graph.node}).new
    for number, node in enumerate(raw.graph.node):
        known = next((named[out] for out in node.output if out in named), "")
        node.name = known or fresh(node.name or f"{node.op_type}_{number}")
    return raw
