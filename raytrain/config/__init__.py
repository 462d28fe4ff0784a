"""The configuration: sections with defaults and ranges, read from YAML and overrides and validated as a whole.

An algorithm's settings are defined next to the class they configure and are nested here. Start with `configuration.py`,
which defines `Config`; `loading.py` reads one, and `reference.py` describes every key.
"""

from raytrain.config.configuration import RUN_ROOT_VARIABLE, Config
from raytrain.config.data import DATA_ROOT_VARIABLE, TokenizerSection
from raytrain.config.experiments import Distribution
from raytrain.config.loading import check_config, load_config
from raytrain.config.sections import ClusterSection
from raytrain.config.values import parse_bytes

__all__ = [
    "DATA_ROOT_VARIABLE",
    "RUN_ROOT_VARIABLE",
    "ClusterSection",
    "Config",
    "Distribution",
    "TokenizerSection",
    "check_config",
    "load_config",
    "parse_bytes",
]
