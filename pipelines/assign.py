"""Job `assign`: write every row into its bucket or into rejected/."""

from pipelines._job import main

if __name__ == "__main__":
    main("assign", description="Write every row into its bucket or into rejected/.")
