"""DeepSpeed ZeRO, stages 0 to 3: the engine runs the passes; what its next forward reads is perturbed.

| stage | sharded | how it is perturbed |
|---|---|---|
| 0 | nothing | `stage0.py` |
| 1, 2 | optimizer state; in 2, gradients | `stage12.py` |
| 3 | the weights too | `stage3.py` |

Except for stage 0 in fp32, the optimizer steps float32 masters that are kept apart from the weights of the forward.
Only the latter are perturbed, and put back by copy: the optimizer never sees w + ε. In bf16 and fp16 that makes it the
usual mixed-precision training: what the forward reads is master + ε, rounded, because most of a small ε is lost where
it is added to what was rounded already. A loss scale is in all gradients alike, and ε does not depend on it.

DeepSpeed has no public calls for most of this. What is used of its internals is listed in the files of the stages, with
the reason, and looked for when a backend is constructed: another DeepSpeed fails there and not in the middle of
training.

Stages 1 to 3 hand flat pieces of tensors to the optimizer. One that treats every weight alike (SGD, AdamW, Lion) steps
as anywhere else; one that looks at whole tensors (LAMB, LARS, AdamP, Muon) is refused (`sharding/optimizer_trial.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ssam_scale.config.deepspeed import REDUCE_BUCKET, taken
from ssam_scale.sharding.interface import Sharding
from ssam_scale.sharding.registry import BACKENDS, Backend, MakeOptimizer, Options
from ssam_scale.sharding.world import World

from .version import import_deepspeed

# DeepSpeed takes seconds to import, so it is imported in the functions: whoever has an engine has imported it.


def is_engine(module: nn.Module) -> bool:
    """Whether `module` is a DeepSpeed engine."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(module, deepspeed.DeepSpeedEngine)


def zero_sharding(engine: Any) -> Sharding:
    """The implementation for a DeepSpeed engine, by the class that DeepSpeed wraps its optimizer in.

    Args:
        engine: what `deepspeed.initialize` returned, ZeRO stage 0 to 3, with an optimizer.

    Raises:
        ValueError: the engine is set up in a way that is not supported; names the setting.
        UnsupportedVersionError: this DeepSpeed is not one whose internals are known.
    """
    from .engine import check_internals, check_setup
    from .stage0 import ZeRO0, ZeRO0LowPrecision
    from .stage3 import ZeRO3
    from .stage12 import ZeRO1BF16, ZeRO12

    check_internals(engine, {})
    check_setup(engine)
    if engine.optimizer is engine.basic_optimizer:
        return ZeRO0(engine)
    by_wrapper: dict[str, type[ZeRO0LowPrecision] | type[ZeRO12] | type[ZeRO1BF16] | type[ZeRO3]] = {
        "FP16_UnfusedOptimizer": ZeRO0LowPrecision,
        "DeepSpeedZeroOptimizer": ZeRO12,
        "BF16_Optimizer": ZeRO1BF16,
        "DeepSpeedZeroOptimizer_Stage3": ZeRO3,
    }
    wrapper = type(engine.optimizer).__name__
    if wrapper not in by_wrapper:
        raise ValueError(f"SparseSAM on a DeepSpeed engine does not support its {wrapper}")
    return by_wrapper[wrapper](engine)


def _place(
    module: nn.Module, make_optimizer: MakeOptimizer, world: World, options: Options, stage: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    import_deepspeed(world.device)
    from .engine import zero_engine

    optimizer = make_optimizer()
    return zero_engine(module, optimizer, stage, options), optimizer


def _release(engine: Any) -> None:
    from .engine import release

    release(engine)


def _held_beside(weights: int, deepspeed: Mapping[str, Any], stage: int) -> int:
    """Masters, and the buckets that gradients are reduced in: of a fixed size, two of them where that overlaps."""
    if stage == 0:
        return 4 * weights
    zero = taken(deepspeed).get("zero_optimization", {})
    buckets = 2 if zero.get("overlap_comm", stage == 3) else 1
    return 4 * weights + 4 * buckets * int(zero.get("reduce_bucket_size", REDUCE_BUCKET))


_SHARDED = {
    0: "nothing is sharded; gradients are all-reduced",
    1: "optimizer states are sharded",
    2: "optimizer states and gradients are sharded",
    3: "optimizer states, gradients and weights are sharded",
}
for _stage, _summary in _SHARDED.items():
    BACKENDS.register(f"zero{_stage}", f"ZeRO stage {_stage}: {_summary}", "DeepSpeed, arXiv 1910.02054")(
        Backend(
            title=f"ZeRO stage {_stage}",
            owns=is_engine,
            sharding=zero_sharding,
            place=partial(_place, stage=_stage),
            launchers="deepspeed or torchrun",
            hands="pieces" if _stage > 0 else "tensors",
            held_beside=partial(_held_beside, stage=_stage),
            release=_release,
        )
    )
