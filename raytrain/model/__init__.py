"""The Canary model: its layers, features, loss and cost by length, and in `formats` the files that hold one.

May import torch, numpy, `errors`, `ranges`, `storage`, `lengths` and `data`; nothing in here knows of Ray, settings
files or training. Open `canary.py` first, then `encoder.py` and `decoder.py`, which it joins.
"""
