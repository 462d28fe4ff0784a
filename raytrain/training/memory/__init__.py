"""The memory of a training step: traced on meta tensors, fitted to a surface, and probed by real steps on a device.

It imports what the training step needs, and `lengths` for the searches of batch sizes; only `step_meter.py` runs on a
device. Open `tracer.py` first (prediction), then `meter.py` and `coordinator.py` (probing).
"""
