"""The cost model: time, bytes and memory of a step, predicted from one resolved step and the times of the stages."""

from ssam_scale import torch_compat  # noqa: F401 - refuses a torch that is too old, before anything looks for more
