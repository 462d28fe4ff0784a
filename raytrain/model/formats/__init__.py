"""Files that hold a model: NeMo archives, Hugging Face folders, and what every format has in common.

May import what `model` may, and safetensors, PyYAML and sentencepiece inside the functions that need them. Open
`portable.py` first: `ModelParts` is what each format is read into and written from.
"""
