"""What TensorRT-RTX makes of a file as it stands: its words if it refuses, else its kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from trtune.configs.errors import TrtuneError
from trtune.precision.backends.gpu.profiles import make_profiles
from trtune.precision.backends.rtx.child import Request
from trtune.precision.backends.rtx.log import Account, accounts, read_kernels
from trtune.precision.backends.rtx.process import build_in_child
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
    """Build `model`, which was loaded without folding, in `folder`, and read what came out.

    `products` are the operators that multiply, as the compiler's log is read. Free dimensions
    besides the batch are a refusal in this package's words. Raises nothing that a file can cause.
    """
    view = GraphView.of(model)
    multiply = frozenset(node.name for node in view.nodes if node.op_type in set(products))
    try:
        profiles = make_profiles(model.inputs, {}, batch=1)
        save_model(model.proto, folder / MODEL_FILE, model.external_dir)
        request = Request(
            model=str(folder / MODEL_FILE),
            plan=str(folder / PLAN_FILE),
            log=str(folder / LOG_FILE),
            answer=str(folder / "answer.json"),
            compute_capabilities=(compute_capability,),
            profiles={name: profile.to_json() for name, profile in profiles.items()},
            as_it_is=True,
        )
        build_in_child(request, folder, timeout=timeout, opset=model.opset)
    except TrtuneError as error:
        return AsItIs(refused=" ".join(str(error).split()))
    kernels = read_kernels((folder / LOG_FILE).read_text("utf-8", errors="replace"))
    return AsItIs(accounts=accounts(kernels, view.by_name, compute=multiply))
