"""DeepSpeed ZeRO: the engine drives; the step perturbs what the engine's next forward reads.

| stage | spread over the processes | the ascent gradient | what a forward reads |
|---|---|---|---|
| 0 | nothing | `.grad` | the parameters |
| 1, 2 | optimizer state; in 2, gradients | own part of a flat gradient | parameters, which are views of a flat buffer |
| 3 | the weights too | own part of each parameter's | whole parameters, gathered from the parts |

Except for stage 0 in fp32, the optimizer steps weights that are kept apart from those that the forward uses. Only the
latter are perturbed, and put back by copy: the optimizer never sees w + ε. In bf16 and fp16 that makes it the usual
training with float32 master weights; a loss scale is in all gradients alike, and ε does not depend on it.

DeepSpeed has no public calls for most of this. What is used of its internals is listed below and in `gathered`, with
the reason, and looked for when a backend is constructed: another DeepSpeed fails there and not in the middle of
training.

Stages 1 to 3 hand flat pieces to the optimizer. One that treats every weight alike (SGD, AdamW, Lion) steps as anywhere
else; one that looks at whole tensors (LAMB, LARS, AdamP, Muon) computes something else.
"""

from __future__ import annotations

from typing import Any

from ssam_scale.sharding.interface import Sharding

from .engine import _check_internals, check_setup
from .stage0 import ZeRO0, ZeRO0LowPrecision
from .stage3 import ZeRO3
from .stage12 import ZeRO1BF16, ZeRO12


def zero_sharding(engine: Any) -> Sharding:
    """The backend of a DeepSpeed engine.

    Args:
        engine: what `deepspeed.initialize` returned, ZeRO stage 0 to 3, with an optimizer.

    Raises:
        ValueError: the engine is set up in a way that is not supported; names the setting.
        RuntimeError: this DeepSpeed is not one whose internals are known.
    """
    _check_internals(engine, {})
    check_setup(engine)
    if engine.optimizer is engine.basic_optimizer:
        return ZeRO0(engine)
    wrapper = type(engine.optimizer).__name__
    if wrapper == "FP16_UnfusedOptimizer":
        return ZeRO0LowPrecision(engine)
    if wrapper == "DeepSpeedZeroOptimizer":
        return ZeRO12(engine)
    if wrapper == "BF16_Optimizer":
        return ZeRO1BF16(engine)
    if wrapper == "DeepSpeedZeroOptimizer_Stage3":
        return ZeRO3(engine)
    raise ValueError(f"SparseSAM on a DeepSpeed engine does not support its {wrapper}")
