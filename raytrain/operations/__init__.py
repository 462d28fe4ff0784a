"""Operators' tasks besides training: check a cluster (`doctor`), submit jobs to it, transcribe whole manifests.

Everything here uses Ray through `raytrain.cluster` and never imports `ray`; it may import all rooms below, and only
`raytrain.cli` imports it. Start with `doctor.py`: it has nodes run the measurements in `machine.py` and
`run_storage.py`, which return the dataclasses in `facts.py`, and `checks.py` evaluates the answers. `submission.py`
packs jobs; `transcription.py` plans the transcription of manifests and `transcript_parts.py` writes it part by part.
"""
