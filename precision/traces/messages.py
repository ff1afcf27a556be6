"""What TensorRT says when it builds and loads, as data: the words, what they mean, what to do.

`seen` is where the words were met: in logs that were read here (with the version), or in the double
of the bindings and in public reports ("reported"). A message that is not in this table is shown as
it stands.
"""

from __future__ import annotations

from dataclasses import dataclass

PROBLEM, NOTE = "problem", "note"


@dataclass(frozen=True, slots=True)
class Message:
    """A message of TensorRT's: `pattern` is a regular expression whose groups `node`, `tensor`,
    `other` and `value` name what it speaks of; `what` and `remedy` may hold them in braces."""

    key: str
    pattern: str
    what: str
    remedy: str
    seen: str
    kind: str = PROBLEM


MESSAGES: tuple[Message, ...] = (
    Message(
        "missing scale",
        r"Missing scale and zero-point for tensor (?P<tensor>.+?), expect fall back",
        "{tensor} has no scale, so every layer that reads or writes it runs in float",
        "Calibrate again with a complete cache (`trtune calibrate` writes one), or put Q/DQ there",
        "8.4 to 10.16 (reported)",
    ),
    Message(
        "calibrator mismatch",
        r"does not match calibrator algorithm type",
        "the cache's header names another algorithm than the calibrator, so it was not read",
        "Give the header of this version and algorithm: `trtune cache convert --to VERSION`",
        "8.x, 10.x (reported)",
    ),
    Message(
        "no scales",
        r"Calibration failure occurred with no scaling factors detected",
        "calibration ended without a single scale: no data came, or a callback raised",
        "Look above for an exception of the calibrator; `calibrator: table` needs no data",
        "8.x, 10.x (reported)",
    ),
    Message(
        "obey and prefer",
        r"k?(?:PREFER|OBEY)_PRECISION_CONSTRAINTS cannot be set if k?(?:OBEY|PREFER)",
        "OBEY and PREFER exclude each other; 10.3 says so without cause",
        "Nothing to do if only one of them was asked for",
        "10.3",
        NOTE,
    ),
    Message(
        "constraint not met",
        r"No implementation of layer (?P<node>.+?) obeys the requested constraints",
        "{node} cannot run in the precision that it was held to; the fastest was taken",
        "Take that pin back, or hold the whole fused group to one precision",
        "7.x, 8.x (reported)",
    ),
    Message(
        "no implementation, workspace",
        r"Could not find any implementation for node (?P<node>.+?) due to insufficient workspace",
        "every kernel for {node} wants more memory than the workspace has",
        "Raise `workspace`, or take a smaller `model.shapes` max",
        "8.x (reported)",
    ),
    Message(
        "no implementation",
        r"Could not find any implementation for node (?P<node>.+?)(?:\.\)|\.?\s*$|\. )",
        "there is no kernel for {node} in the types that it was given",
        "Leave its nodes in float: `precision.pin: {{node: fp32}}`",
        "8.x, 10.x (reported)",
    ),
    Message(
        "unsupported operator",
        r"No importer registered for op: (?P<value>[\w.]+)",
        "TensorRT's parser does not know the operator {value}",
        "Replace it, register a plugin, or cut the model there (`model.outputs`)",
        "8.x to 11.x (reported)",
    ),
    Message(
        "missing plugin",
        r"(?:could not find plugin:?|Plugin not found[^:]*:?|creator for plugin) (?P<value>[\w.]+)",
        "the plugin {value} is not loaded",
        "Load its library before parsing (trtexec --plugins=FILE)",
        "7.x to 10.x (reported)",
    ),
    Message(
        "out of memory",
        r"(?:Requested amount of GPU memory \((?P<value>\d+) bytes\)|out ?of ?memory|OutOfMemory|"
        r"insufficient memory on tactic)",
        "the GPU's memory did not suffice",
        "Free the GPU (nvidia-smi lists who holds it), or lower `workspace` or `model.shapes` max",
        "7.x to 10.x (reported)",
    ),
    Message(
        "version mismatch",
        r"not compatible with this version of TensorRT, expecting library version (?P<value>\S+) "
        r"got (?P<other>[\d.]+)",
        "the plan was built with another version: {value} is here, the plan wants {other}",
        "Build it again here, or install that version",
        "8.x (reported)",
    ),
    Message(
        "version mismatch",
        r"Version tag does not match|stdVersionRead == (?:kSERIALIZATION_VERSION|serialization)",
        "the plan was built with another version of TensorRT",
        "Build it again here; `trtune inspect engine.plan` says which version made it",
        "8.x, 10.x (reported)",
    ),
    Message(
        "compute capability",
        r"incompatible device, expecting compute (?P<value>[\d.]+) got compute (?P<other>[\d.]+)",
        "the plan was built for a GPU of compute capability {other}, and this one has {value}",
        "Build it on this GPU, or with `hardware_compatibility: ampere_plus`",
        "8.x, 10.x (reported)",
    ),
    Message(
        "compute capability",
        r"The engine cannot run on this GPU",
        "the plan was built for other GPUs",
        "Name this one in `compute_capabilities` and build again",
        "TensorRT-RTX 1.7.1",
    ),
    Message(
        "other device",
        r"Using an engine plan file across different models of devices is not recommended",
        "the plan was tuned on another GPU model: it runs, but slower than one built here",
        "Build it on this GPU",
        "7.x to 10.x (reported)",
        NOTE,
    ),
    Message(
        "no INT8",
        r"[Ii]nt8 support requested on hardware without native Int8 support",
        "this GPU has no INT8 arithmetic",
        "Build in fp16 or fp32",
        "7.x to 10.x (reported)",
    ),
    Message(
        "no GPU",
        r"CUDA initialization failure with error: (?P<value>\d+)",
        "CUDA does not start (error {value})",
        "Check driver and GPU: `nvidia-smi`, `trtune doctor`",
        "8.x to 11.x",
    ),
    Message(
        "no profile",
        r"dynamic or shape inputs, but no optimization profile",
        "an input has free dimensions and no range was given for them",
        "Give min, opt and max in `model.shapes`",
        "7.x to 11.x (reported)",
    ),
    Message(
        "half range",
        r"(?:subnormal FP16 values|converted to FP16|outside of the range of FP16|FP16 overflow)",
        "values do not fit FP16",
        "Keep the layers named in fp32, or use bf16",
        "8.x, 10.x (reported)",
    ),
    Message(
        "INT64 weights",
        r"has been generated with INT64 weights",
        "INT64 constants became INT32",
        "Nothing to do unless a value exceeds 2^31",
        "7.x to 9.x (reported)",
        NOTE,
    ),
    Message(
        "falls back from DLA",
        r"^\s*(?P<node>\S+)(?!\S).*[Ss]witching this layer'?s device type to GPU",
        "{node} does not run on the DLA, and was given to the GPU",
        "Give it INT8 or FP16 and a supported shape, or accept the copies between both",
        "8.x (reported)",
    ),
    Message(
        "concat retargeted",
        r"Retargeting (?P<tensor>.+?) to (?P<other>.+)",
        "{tensor} is written straight into {other}, the output of a Concat",
        "Its scale becomes that of the Concat's output",
        "8.x",
        NOTE,
    ),
    Message(
        "concat scale",
        r"Assigning (?P<tensor>\S+) scale .*?using (?P<other>\S+)",
        "{tensor} was given the scale of {other}",
        "Inputs of a Concat take its output's scale; with Q/DQ they keep their own",
        "8.x",
        NOTE,
    ),
    Message(
        "duplicate Q",
        r"Eliminating (?P<node>.+?) which duplicates \(Q\) (?P<other>.+)",
        "{node} quantizes what {other} quantizes already: one is left",
        "Nothing to do",
        "8.5.2",
        NOTE,
    ),
    Message(
        "fused",
        r"\w+: [Ff]using (?P<node>.+?) (?:with|into) (?P<other>.+)",
        "{node} was fused with {other}",
        "A pin on one of them holds for both",
        "8.5.2",
        NOTE,
    ),
)
