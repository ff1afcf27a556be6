from __future__ import annotations

import pytest
import realdata
import tinymodels

from trtune.precision.graph.file import model_from_proto
from trtune.precision.graph.view import GraphView
from trtune.precision.traces.explain import explain_log, match_message
from trtune.precision.traces.messages import MESSAGES

SAID = [
    ("missing scale", "Missing scale and zero-point for tensor conv2, expect fall back to non-int8 "
     "implementation for any layer consuming or producing given tensor"),
    ("calibrator mismatch", "Calibration table does not match calibrator algorithm type."),
    ("no scales", "Calibration failure occurred with no scaling factors detected."),
    ("obey and prefer", "kPREFER_PRECISION_CONSTRAINTS cannot be set if "
     "kOBEY_PRECISION_CONSTRAINTS is set."),
    ("constraint not met", "No implementation of layer conv2 obeys the requested constraints in "
     "strict mode."),
    ("no implementation, workspace", "Could not find any implementation for node n_conv2 due to "
     "insufficient workspace. See verbose log for requested sizes."),
    ("no implementation", "10: [optimizer.cpp::computeCosts::3869] Error Code 10: Internal Error "
     "(Could not find any implementation for node n_conv2 + n_relu2.)"),
    ("unsupported operator", "No importer registered for op: NonZero. Attempting to import as "
     "plugin."),
    ("out of memory", "Requested amount of GPU memory (8589934592 bytes) could not be allocated."),
    ("version mismatch", "The engine plan file is not compatible with this version of TensorRT, "
     "expecting library version 8.5.2.2 got 8.6.1.6, please rebuild."),
    ("compute capability", "The engine plan file is generated on an incompatible device, expecting "
     "compute 8.6 got compute 8.9, please rebuild."),
    ("no GPU", "CUDA initialization failure with error: 35"),
    ("no profile", "Network has dynamic or shape inputs, but no optimization profile has been "
     "defined."),
    ("concat retargeted", "Retargeting 135 to 155"),
    ("fused", "ConvReluFusion: Fusing n_conv1 with n_relu1"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text"), SAID, ids=[key for key, _ in SAID])
def test_messages(key: str, text: str) -> None:
    found = match_message(text)
    assert found is not None
    message, words = found
    assert message.key == key
    assert "{" not in message.what.format(**words)
    assert message.remedy.format(**words)


def test_every_message_says_where_it_was_seen_and_what_to_do() -> None:
    assert all(m.seen and m.remedy and m.kind in ("problem", "note") for m in MESSAGES)


def test_a_log_with_the_nodes_of_the_model() -> None:
    text = "\n".join(
        [
            "&&&& RUNNING TensorRT.trtexec [TensorRT v101401] # trtexec --onnx=m.onnx",
            *(f"[01/02/2025-10:11:12] [W] [TRT] {SAID[0][1]}" for _ in range(3)),
            f"[01/02/2025-10:11:13] [E] {SAID[6][1]}",
            "[01/02/2025-10:11:13] [E] [TRT] something that nobody has seen",
            "[01/02/2025-10:11:13] [I] all is well",
        ]
    )
    view = GraphView.of(model_from_proto(tinymodels.conv_relu()))
    found = explain_log(text, view)
    scale, kernel, other = found.problems
    assert (found.version, found.lines) == ("10.14.1", 7)
    assert (scale.key, scale.count, scale.line, scale.nodes) == (
        "missing scale",
        3,
        2,
        ("n_conv2",),
    )
    assert kernel.nodes == ("n_conv2", "n_relu2")
    assert "precision.pin: {node: fp32}" in kernel.remedy
    assert (other.key, other.what) == ("not explained", "something that nobody has seen")


@realdata.needs_data
def test_a_real_log() -> None:
    path = realdata.trace("logs", "trtexec_verbose_8502_yolo_qat.log")
    found = explain_log(path.read_text())
    assert (found.version, found.lines, found.problems) == ("8.5.2", 12933, ())
    assert found.notes() == {"fused": 258, "duplicate Q": 5, "concat retargeted": 2}
    assert len(found.layers) == 86
    assert found.precisions() == {"int8": 43}
