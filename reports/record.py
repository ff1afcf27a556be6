"""The run record: what a run measured and decided, as `run.json` holds it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ORIGINAL = "original"
"""The variant that is the user's quantized file as it stands."""


class _Value(BaseModel):
    # JSON has no infinity; the SQNR of equal outputs is one, and null would not be read back
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Latency(_Value):
    """Milliseconds of one inference of `batch` samples, after warm-up, on the unmarked model.

    On a GPU they are of the computation alone; `end_to_end` is the median with the copies to and
    from it, `throughput` samples a second queued one behind another, and `note` why no CUDA graph
    was launched.
    """

    median: float
    p95: float
    runs: int
    batch: int
    p99: float | None = None
    end_to_end: float | None = None
    throughput: float | None = None
    cuda_graph: bool | None = None
    note: str = ""


class Speedup(_Value):
    """How many times as fast as FP32: the median over `turns` that both took one after the other.

    `low` and `high` hold it with 95 % confidence; null where there were too few turns to say.
    """

    median: float
    low: float | None = None
    high: float | None = None
    turns: int = 0


class Shipped(_Value):
    """Which model is the one to deploy on a backend, as measured on the machine of the run.

    `model` is `quantized` (as planned), `partly` (the layers in `floats` are left in FP32, because
    they take longer in INT8 with what they need around them) or `fp32`, and `path` its file.
    `speedups` has each of them that was timed.
    """

    model: Literal["quantized", "partly", "fp32"]
    path: str
    floats: list[str] = Field(default_factory=list)
    speedups: dict[str, Speedup] = Field(default_factory=dict)


class Baseline(_Value):
    """The FP32 model's value of the target metric. For sqnr_db and cosine there is none: null.

    `output` is the output that was scored, where the metric chose it.
    """

    metric: str
    value: float | None
    samples: int
    output: str | None = None


class EngineFinding(_Value):
    """What the engine's own account says against it: at which layer, and what to do."""

    kind: str
    layer: str
    nodes: list[str] = Field(default_factory=list)
    found: str = ""
    remedy: str = ""
    milliseconds: float | None = None


class Closeness(_Value):
    """How close one output is to FP32's; `left_out` samples had another shape."""

    sqnr_db: float
    cosine: float
    left_out: int = 0


class PinCost(_Value):
    """A node that the `origin` (user or tuner) holds to a precision, and what that costs in speed;
    `part` is its part of all multiplications of the network."""

    node: str
    precision: str
    origin: str
    part: float
    cost: str


class Variant(_Value):
    """One model on one backend: `fp32`, `int8` (or another untuned one) or `tuned`.

    Of a model that was quantized already there is `original`, the file as it stands; `fp32` is then
    what it is without its quantization, and the untuned variant is called `qat`.

    `value` is that of the target's metric and `drop` what it lost against FP32; `top1` is measured
    beside it where there are labels. `nodes` counts what is planned, `account` what the runtime
    itself says (with "unknown" where it does not). `status` is absent for a backend that this
    machine has not, failed for one that could not build or run: it then has this one variant.
    `verdict` says whether it meets the target. `error` is the standard error of `value` over
    pictures, paired with FP32 where a difference is asked for; `sqnr_error` and `agreement_error`
    those of what is beside it. `interval` holds `value` with 95 % confidence, from
    the pictures' own spread: of the difference to FP32 on the same `samples` pictures where that is
    what the target asks for; `within_noise` says that the target lies inside. `outputs` has how
    close every output is, and every part of one that is judged apart.
    `pinned` are the nodes that the user or the tuner holds to a precision that costs speed, `moved`
    those in fp8, and `pins` says of each what it costs. `reason` says why it could not run here,
    `command` builds the same engine with NVIDIA's tool, `notes` is what the backend has to say.
    `lints` are what the engine's own account says against it, `explained` what its build log does.
    `engines` are those for other GPUs: type or compute capability, and the file in the run.
    `shipped` says which model is the one to deploy, where that was decided by time.
    """

    name: str
    backend: str
    value: float | None
    drop: float | None = None
    error: float | None = None
    interval: tuple[float, float] | None = None
    verdict: Literal["met", "missed"] | None = None
    within_noise: bool = False
    samples: int = 0
    outputs: dict[str, Closeness] = Field(default_factory=dict)
    top1: float | None = None
    sqnr_db: float | None = None
    sqnr_error: float | None = None
    agreement: float | None = None
    agreement_error: float | None = None
    latency_ms: Latency | None = None
    latency_note: str | None = None
    size_bytes: int | None = None
    nodes: dict[str, int] = Field(default_factory=dict)
    account: dict[str, int] = Field(default_factory=dict)
    pinned: list[str] = Field(default_factory=list)
    moved: list[str] = Field(default_factory=list)
    pins: list[PinCost] = Field(default_factory=list)
    not_honoured: list[str] = Field(default_factory=list)
    path: str | None = None
    status: Literal["done", "absent", "failed"] = "done"
    reason: str | None = None
    command: str | None = None
    notes: list[str] = Field(default_factory=list)
    lints: list[EngineFinding] = Field(default_factory=list)
    explained: list[str] = Field(default_factory=list)
    engines: dict[str, str] = Field(default_factory=dict)
    shipped: Shipped | None = None


class TuningStep(_Value):
    """One evaluated set of pins: `action` is start, move (to fp8), pin, unpin (kept) or
    unpin-rejected; `moved` are the nodes in fp8, which cost no speed and are no pins.

    `value` is that of the first backend, and `values` has those of all that it was measured on: the
    first that misses the target ends a step. `error` is the standard error of `value`, paired with
    FP32 where a difference is asked for. A step is not `whole` that was ended after `samples`
    pictures, because the rest could not meet the target any more.
    """

    step: int
    action: str
    pinned: list[str]
    moved: list[str] = Field(default_factory=list)
    value: float
    builds: int
    seconds: float
    sqnr_db: float | None = None
    met: bool = False
    cached: bool = False
    reason: str = ""
    values: dict[str, float] = Field(default_factory=dict)
    error: float | None = None
    samples: int = 0
    whole: bool = True


class FrontPoint(_Value):
    """The least noise that was measured with so many pins of the tuner; no fewer have less."""

    pins: int
    pinned: list[str]
    value: float
    met: bool = False
    error: float | None = None
    sqnr_db: float | None = None


class Used(_Value):
    """How many samples of a section of the data were used, `of` how many; null where unknown."""

    used: int
    of: int | None = None


class Chosen(_Value):
    """What the pins were chosen by, where `data.validation` gives pictures of its own for that.

    `baseline` is FP32's value there, `threshold` what the target asks for there, `value` what the
    tuned plan reaches on the first backend, `met` whether it holds on all of them.
    """

    samples: int
    baseline: float | None
    threshold: float | None
    value: float
    met: bool


class Outlier(_Value):
    """The picture that sets a tensor's maximum, and how far above the median it is.

    `median_max` is the median over pictures of the largest |x| in the tensor; `ratio` is
    `max / median_max`; `runner_up` the largest |x| without that picture.
    """

    tensor: str
    item: str
    max: float
    median_max: float
    ratio: float
    runner_up: float


class DominantPicture(_Value):
    """A picture that sets the range of many tensors far above the median."""

    item: str
    tensors: int
    worst_ratio: float
    worst_tensor: str


class CalibrationRecord(_Value):
    """What calibration did. `seconds` is all of it, `inference_seconds` what the runtime took."""

    method: str
    pictures: int
    seconds: float
    inference_seconds: float
    peak_rss_bytes: int
    tensors: int
    passes: int = 1
    reused: bool = False
    search_seconds: float = 0.0
    skipped: list[str] = Field(default_factory=list)
    dominant: list[DominantPicture] = Field(default_factory=list)
    outliers: list[Outlier] = Field(default_factory=list)
    methods: dict[str, int] = Field(default_factory=dict)


class HistogramPlot(_Value):
    """A tensor's histogram of |x| for the report: `edges` has one entry more than `counts`.

    `item` is the picture that sets its maximum.
    """

    tensor: str
    edges: list[float]
    counts: list[float]
    amax: float
    max: float
    method: str
    item: str = ""


class TensorRange(_Value):
    """Range and histogram of one tensor, small enough to be kept for every one.

    `heights` has a character for each of the bins of equal ratio over the four decades below `max`:
    0 for none, then a to z and A to Z by the logarithm of the count, Z for the fullest.
    `item` is the picture that sets `max`, `ratio` how far that is above the median picture's.
    """

    tensor: str
    amax: float
    max: float
    method: str
    heights: str
    item: str = ""
    ratio: float = 1.0


class RunRecord(_Value):
    """Everything `run.json` holds; the report is drawn from it and from `layers.csv` alone.

    `prepared` maps a tensor or node to the moves it was prepared with: scale, shift, round, bias.
    `data` says how many samples each section of the data gave. `front` has pins against value;
    `pins_needed` says how many pins a missed target would take, as far as can be predicted.
    `ranges` has every tensor that has a scale, `thumbnails` small pictures of those that set
    ranges, as `data:` addresses by item. With `validation` the values of `tuning` and `front` are
    of those pictures, and all others of data.evaluation, which then decides the status. `command`
    repeats the run, `polygraphy` are lines that show and repeat its outputs, in its folder.
    """

    schema_version: int = Field(1, alias="schema")
    name: str
    key: str
    status: Literal["met", "missed", "failed"]
    model: dict[str, Any] = Field(default_factory=dict)
    target: dict[str, Any] | None = None
    baseline: Baseline
    variants: list[Variant] = Field(default_factory=list)
    tuning: list[TuningStep] = Field(default_factory=list)
    front: list[FrontPoint] = Field(default_factory=list)
    pins_needed: int | None = None
    validation: Chosen | None = None
    data: dict[str, Used] = Field(default_factory=dict)
    calibration: CalibrationRecord | None = None
    histograms: list[HistogramPlot] = Field(default_factory=list)
    ranges: list[TensorRange] = Field(default_factory=list)
    thumbnails: dict[str, str] = Field(default_factory=dict)
    prepared: dict[str, list[str]] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    command: str = ""
    polygraphy: list[str] = Field(default_factory=list)
    started: str = ""
    seconds: float = 0.0
    versions: dict[str, str] = Field(default_factory=dict)
    hashes: dict[str, str] = Field(default_factory=dict)

    model_config = ConfigDict(populate_by_name=True)

    def to_json(self) -> str:
        """The record as the text of `run.json`."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunRecord:
        """Read what `to_json` wrote; raises pydantic.ValidationError if it is something else."""
        return cls.model_validate_json(text)


class LayerRow(_Value):
    """One node of the model in `layers.csv`.

    `accumulated_*` compare the node's output in the whole quantized network with FP32; `alone_*`
    compare the network's output when only this node is quantized. Errors are null where they were
    not measured; `origin` says who decided the precision (user, tuner, rule, ...), `reason` why, in
    words; `sqnr_db` values are decibels, `amax` is of the node's quantized input. `runs_in`
    is the precision in each runtime's own account, such as "tensorrt_rtx: int8". `runtime_*`
    compare the engine with its Q/DQ model in onnxruntime; `runtime` says which engine, and how
    inner tensors were read (the outputs are always those of the engine that is reported).
    `producers` are the rows, counted from 1, of the nodes whose outputs it reads.
    """

    node: str
    op: str
    shape: str
    macs: int
    parameters: int
    precision: str
    reason: str
    runs_in: str = ""
    tensor: str = ""
    amax: float | None = None
    method: str = ""
    accumulated_sqnr_db: float | None = None
    accumulated_cosine: float | None = None
    accumulated_relative_l2: float | None = None
    accumulated_mean_relative: float | None = None
    accumulated_max_abs: float | None = None
    alone_sqnr_db: float | None = None
    alone_cosine: float | None = None
    alone_relative_l2: float | None = None
    runtime: str = ""
    runtime_sqnr_db: float | None = None
    runtime_relative_l2: float | None = None
    runtime_max_abs: float | None = None
    time_ms: float | None = None
    origin: str = ""
    producers: str = ""
