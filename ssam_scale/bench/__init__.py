"""Benchmarks: time, memory and bytes of a part of the package, next to the usual alternative in the same run."""

from ssam_scale import torch_compat  # noqa: F401 - refuses a torch that is too old, before anything looks for more
