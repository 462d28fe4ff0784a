"""Job `statistics`: train the tokenizer if none is given, and count lengths."""

from pipelines._job import main

if __name__ == "__main__":
    main("statistics", description="Train the tokenizer if none is given, and count lengths.")
