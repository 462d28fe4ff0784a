"""Model files: NeMo archives, Hugging Face folders, and their common parts.

May import whatever `model` may, and safetensors, PyYAML and sentencepiece inside the functions that need them. Open
`portable.py` first: `ModelParts` is what each format is read into and written from.
"""
