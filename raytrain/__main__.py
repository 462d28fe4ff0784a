"""`python -m raytrain`, and the program `raytrain`."""

import os

try:
    from raytrain.cli import stopping
except KeyboardInterrupt:  # too early for its own handler
    os.write(2, b"stopped\n")
    os._exit(130)


def main() -> None:
    """Run the command line; a signal that comes while its modules are read ends it as cleanly as later."""
    stopping.install()
    with stopping.exit_codes():
        from raytrain.cli.app import main

        main()


if __name__ == "__main__":
    main()
