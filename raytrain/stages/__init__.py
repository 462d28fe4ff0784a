"""The pipeline's stages, one file each, with `key` (what the stage depends on) and `run` (what it does); beside them
what the larger ones are made of (`length_statistics`, `unknown_pieces`; `devices`, `predicted_sizes`,
`batch_profiles`) and previews that write nothing.

A stage reads artifacts from the run folder, calls pure functions, passes dataclasses to one function in `cluster/`, and
writes its artifact; it may import all rooms below. Start with `pipeline.py`: `STAGES` lists the stages in order.
"""
