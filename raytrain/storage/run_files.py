"""The files of a run folder by their names, in the order in which stages write them.

Notes that only one module reads and writes (`files.json`, `owner.json`, `trial.json`, …) have their names there.
"""

from __future__ import annotations

CONFIG = "config.yaml"  # the resolved configuration
STAGE_RECORDS = "stages.json"  # finished stages: their keys, and ids of what they wrote
MLFLOW_RUN = "mlflow_run.json"  # ids of the run on the tracking server

# statistics, beside the folder tokenizer/
HISTOGRAM = "histogram.parquet"
STATISTICS = "statistics.json"
CHUNKS = "chunks.json"
# buckets
BUCKET_PLAN = "bucket_plan.json"
# assign
ASSIGNMENT_INDEX = "assignment/index.json"
# oomptimize
BATCH_PROFILE = "batch_profile.json"
BATCH_PROBES = "batch_probes.json"  # what was measured so far, from which a stopped search resumes
# train
METRICS = "metrics.jsonl"
LOWERED_PROFILE = "batch_profile_lowered.json"  # batch sizes after faults
QUARANTINE = "quarantine.jsonl"  # recordings that can't be read
LINEAGE_NOTE = "checkpoints/lineage.json"
TRAINED_NOTE = "checkpoints/last.json"  # the checkpoints that training ended with
# evaluate
HYPOTHESES = "hypotheses.jsonl"
SCORES = "scores.json"
ERRORS_PAGE = "errors.html"
# report
REPORT = "report.html"
# tune
TUNE = "tune.json"
