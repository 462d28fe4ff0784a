"""The Canary model: its layers, features, loss and cost by length, and, in `formats`, the model files.

May import torch, numpy and the rooms up to `data`; nothing here knows about Ray, configuration files or training. Open
`canary.py` first, then `encoder.py` and `decoder.py`, which it combines.
"""
