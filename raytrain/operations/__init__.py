"""What operators do beside training: check a cluster (`doctor`), submit jobs to it, transcribe whole manifests.

Everything here reaches Ray through `raytrain.cluster` and never imports `ray`; it may import all rooms below, and only
`raytrain.cli` imports it. Open `doctor.py` first: it asks nodes what `machine.py` and `run_storage.py` measure, as the
values of `facts.py`, and `checks.py` judges the answers.
"""
