"""`python -m raytrain`, and the program `raytrain`."""

from raytrain import stopping


def main() -> None:
    """Run the command line; a signal that comes while its modules are read ends it as cleanly as later."""
    stopping.install()
    with stopping.exit_codes():
        from raytrain.cli import main

        main()


if __name__ == "__main__":
    main()
