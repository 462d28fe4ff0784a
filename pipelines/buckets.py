"""Job `buckets`: cut durations and tokens into a grid of buckets."""

from pipelines._job import main

if __name__ == "__main__":
    main("buckets", description="Cut durations and tokens into a grid of buckets.")
