"""Hugging Face folders: what `transformers.CanaryForConditionalGeneration` loads and saves.

    write_huggingface(parts, Path("canary-hf"))
    parts = read_huggingface(Path("canary-hf"))       # bit-equal

Hugging Face has neither aggregate tokenizers nor our training settings, so `raytrain.json`, `raytrain.safetensors`
and `tokenizer/*.model` hold them beside its own files. Its decoder puts the sines of a position before the cosines
where ours alternates them. The blocks don't care for the order of the residual stream's dimensions, so the decoder's
weights are reordered, which is exact. Evaluation gives the same results; training there has fewer dropouts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytrain.errors import CheckpointError, StorageError
from raytrain.model.canary import Canary, exported_state
from raytrain.model.config import ModelConfig, SpecAugmentSettings
from raytrain.model.huggingface_config import config_json, features_json, settings_of
from raytrain.model.portable import ModelParts, check_state
