"""The description of a run, and how it is read: `load` a YAML file with overrides, `dump` what came out."""

from ssam_scale.config.load import dump, load
from ssam_scale.config.schema import Config

__all__ = ["Config", "dump", "load"]
