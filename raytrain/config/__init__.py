"""What a person may set: sections with their defaults and ranges, read from YAML and overrides and checked as a whole.

Settings of one algorithm stand beside the class that they configure, and are nested here. Open `configuration.py`
first: `Config`; `loading.py` reads one, and `reference.py` lists all keys with their facts.
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
