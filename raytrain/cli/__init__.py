"""The command line `raytrain`: one file per group of commands, which parse options, call one function and print.

It may import from every room, but only inside the commands: `raytrain --help` must not wait for Ray, PyTorch or
pydantic. Start with `app.py`, which assembles the commands; `stopping.py` handles Ctrl-C and SIGTERM.
"""
