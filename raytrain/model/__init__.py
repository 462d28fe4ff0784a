"""The Canary model: its layers, features, loss and cost by length, and in `formats` the files that hold one.

May import torch, numpy and the rooms up to `data`; nothing in here knows of Ray, configuration files
or training. Open `canary.py` first, then `encoder.py` and `decoder.py`, which it joins.
"""
