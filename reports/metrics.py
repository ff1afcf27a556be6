"""The metrics that a run asks for by name; see `trtune.reports.measures`."""

from trtune.reports.measures.fidelity import FIDELITY_METRICS
from trtune.reports.measures.find import METRICS, find_metric

__all__ = ["FIDELITY_METRICS", "METRICS", "find_metric"]
