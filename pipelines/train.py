"""Job `train`: train on all workers; resumes from the newest checkpoint."""

from pipelines._job import main

if __name__ == "__main__":
    main("train", description="Train on all workers; resumes from the newest checkpoint.")
