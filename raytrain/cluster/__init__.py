"""Everything that touches Ray: distributing work over a cluster and recovering when part of it fails.

Only this room imports Ray. It may import all rooms below it, and the work it distributes (a training step, a model, a
file of rows) is defined there. Start with `session.py`, which starts or joins Ray, then read `trainer.py` for training,
`inference.py` for decoding, `trials.py` and `tuning.py` for Ray Tune. `supervisor.py` and `gpu_driver.py` import no Ray:
a local Ray needs the first to end with its driver, its nodes the second to count their GPUs.
"""
