"""What NeMo wrote down of reference models."""

import json

import pytest
from conftest import SHARED

from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.model.formats.nemo import read_nemo


def recorded(name: str) -> tuple[CanaryTokenizer, dict]:
    """Tokenizer of a reference model and its recorded decoding."""
    root = SHARED / "reference" / name
    if not root.exists():
        pytest.skip("needs the reference models")
    decoded = json.loads((root / "decode_single.json").read_text())
    return CanaryTokenizer(read_nemo(root / "model.nemo").tokenizers), decoded
