"""The run folder seen as objects: its artifacts, and what is built from them, on the driver and on every worker.

It may import all rooms below, but neither Ray nor stages; whatever is here can be rebuilt on any node from the
configuration and the run folder's path or URI. Open `workspace.py` first: `Workspace` gives the artifacts by name.
"""
