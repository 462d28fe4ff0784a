"""The run folder seen as objects: its artifacts, and what is built from them, on the driver and on every worker.

It may import all rooms below, but neither Ray nor stages; everything here can be rebuilt on any node from the
configuration and the run folder's path or URI. Start with `workspace.py`: `Workspace` provides the artifacts by name.
"""
