"""Building a DeepSpeed engine for SparseSAM."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import deepspeed
import torch
from torch import nn


def zero_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    stage: int,
    *,
    batch_size: int,
    accumulation: int = 1,
    max_grad_norm: float | None = None,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """`deepspeed.initialize` with the settings that follow from how SparseSAM trains.

    Args:
        module: the model, on its device.
        optimizer: over its parameters.
        stage: of ZeRO, 0 to 3.
        batch_size: samples of one micro-batch on one process.
        accumulation: micro-batches in one step.
        max_grad_norm: the descent gradient is clipped to this norm.
        config: further sections of DeepSpeed's configuration.

    Raises:
        ValueError: DeepSpeed does not take the configuration.
    """
    sections = dict(config or {})
    settings = {
        "steps_per_print": sys.maxsize,  # one line every ten steps otherwise
        **sections,
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm or 0.0,  # left out it is 1.0 since 0.19.3
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {**sections.get("zero_optimization", {}), "stage": stage},
    }
    try:
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
        raise ValueError(f"DeepSpeed does not take its configuration: {_short(error)}") from error
    assert isinstance(engine, nn.Module)
    if not sections.get("torch_autocast"):
        _OuterAutocast(engine, module)
    return engine


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class _OuterAutocast:
    """Carries a `torch.autocast` around the engine's forward into it: DeepSpeed turns one off that is not its own.

    Its own (`torch_autocast`) would also communicate the gradients in low precision.
    """

    def __init__(self, engine: nn.Module, module: nn.Module) -> None:
        self._device = next(module.parameters()).device.type
        self._outside: torch.dtype | None = None
        self._inside = ExitStack()
        engine.register_forward_pre_hook(self._note)
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _note(self, engine: nn.Module, inputs: Any) -> None:
        on = torch.is_autocast_enabled(self._device)
        self._outside = torch.get_autocast_dtype(self._device) if on else None

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if self._outside is not None:
            self._inside.enter_context(torch.autocast(self._device, self._outside))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._inside.close()
