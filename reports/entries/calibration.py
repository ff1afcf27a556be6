"""What calibration did, and which pictures set its ranges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from trtune.calibrate.outliers import dominant, outliers
from trtune.configs.system.machine import peak_rss
from trtune.precision.tune.scales import Calibrated
from trtune.reports.record import CalibrationRecord, DominantPicture, Outlier

SHOWN_OUTLIERS = 60


def calibration_record(
    found: Calibrated, method: str, *, reused: bool, left_out: Sequence[str]
) -> CalibrationRecord:
    """What calibration did, and which pictures set its ranges."""
    ranked = outliers(found.histograms)
    return CalibrationRecord(
        method=method,
        pictures=found.pictures,
        seconds=found.seconds,
        inference_seconds=found.inference_seconds,
        peak_rss_bytes=peak_rss(),
        tensors=len(found.table.scales),
        passes=found.passes,
        reused=reused,
        search_seconds=found.search_seconds,
        skipped=list(left_out),
        dominant=[DominantPicture(**asdict(d)) for d in dominant(ranked)],
        outliers=[Outlier(**asdict(o)) for o in ranked[:SHOWN_OUTLIERS]],
        methods=dict(Counter(found.table.methods.values())),
    )
