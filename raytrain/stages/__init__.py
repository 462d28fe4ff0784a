"""The pipeline's stages, one file each, with `key` (what the stage depends on) and `run` (what it does).

A stage reads artifacts from the run folder, calls pure functions, passes dataclasses to one function in `cluster/`, and
writes its artifact; it may import all rooms below. Start with `pipeline.py`: `STAGES` lists the stages in order.
"""
