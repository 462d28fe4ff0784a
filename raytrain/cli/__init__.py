"""The command line `raytrain`: a file for each group of commands, which parse options, call one function and print.

It may import from every room, but inside the commands: `raytrain --help` must not wait for Ray, PyTorch or pydantic.
Open `app.py` first, which puts the commands together; `stopping.py` is what Ctrl-C and SIGTERM do.
"""
