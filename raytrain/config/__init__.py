"""What a person may set: sections with their defaults and ranges, read from YAML and overrides and checked as a whole.

Open `settings.py` first: `Config` and `load_config`. Settings of one algorithm stand beside the class that they
configure, and are nested here.
"""

from raytrain.config.settings import (
    DATA_ROOT_VARIABLE,
    RUN_ROOT_VARIABLE,
    ClusterSection,
    Config,
    Distribution,
    TokenizerSection,
    check_config,
    load_config,
    parse_bytes,
)

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
