"""The pipeline's stages in files of their names, each with `key` (what it depends on) and `run` (what it does).

A stage reads artifacts of the run folder, asks pure functions, hands dataclasses to one function in `cluster/`, and
writes the artifact; it may import all rooms below. Open `pipeline.py` first: `STAGES` lists them in order.
"""
