"""From manifests to batches: corpora and their texts, audio, assigned rows, and the loader of training steps.

From the ground up: `text/` (tokenizers and prompts) and `audio/` depend on nothing else here; `corpora/` reads rows
with them; `locator` finds the rows' audio and `sequences` encodes their tokens; `assignment/` stores them on disk;
`batch`, `work`, `quarantine`, `loader` and `stream` turn them into training steps. Imports `storage` and `lengths`, no
model and no Ray; open `corpora/types` first, then `assignment` and `loader`.
"""
