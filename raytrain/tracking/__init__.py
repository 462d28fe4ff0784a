"""Experiment tracking behind a protocol: numbers go to JSON lines first, then to MLflow.

Nothing reads back from a tracking server. Open `base.py` first (the protocol), then `runs.py` (a pipeline's runs) and
`mlflow.py`, the only file that imports MLflow.
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
