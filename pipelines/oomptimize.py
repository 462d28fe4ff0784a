"""Job `oomptimize`: find every bucket's batch size."""

from pipelines._job import main

if __name__ == "__main__":
    main("oomptimize", description="Find every bucket's batch size.")
