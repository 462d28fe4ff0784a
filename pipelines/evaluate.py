"""Job `evaluate`: transcribe the test manifests and score them."""

from pipelines._job import main

if __name__ == "__main__":
    main("evaluate", description="Transcribe the test manifests and score them.")
