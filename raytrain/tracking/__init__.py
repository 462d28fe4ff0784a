"""Experiment tracking behind a protocol: metrics go to JSON lines first, then to MLflow.

Nothing is read back from a tracking server. Start with `base.py` (the protocol), then read `runs.py` (a pipeline's
runs) and `mlflow.py`, the only file that imports MLflow.
"""

from raytrain.tracking.base import (
    JsonLinesTracker,
    MlflowRun,
    MultiTracker,
    NullTracker,
    Tracker,
    metrics_of,
    read_metrics,
)

__all__ = ["JsonLinesTracker", "MlflowRun", "MultiTracker", "NullTracker", "Tracker", "metrics_of", "read_metrics"]
