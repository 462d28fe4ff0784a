"""Files, local or remote: artifacts with content ids, paths and URIs of any filesystem, run folders and their owners.

May import the files at the top of the package and libraries for files; knows no corpus, no model and no Ray. Open
`artifacts.py` first (what a stage writes), then `filesystem.py` (a path or a URI) and `run_store.py` (a run folder at a
URI, as a machine sees it).
"""
