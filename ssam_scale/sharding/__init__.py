"""Where the weights live: one interface, one file a backend.

| to read | for |
|---|---|
| `interface.py` | what a backend does: weights, passes, state |
| `registry.py`, `place.py` | adding a backend; finding and choosing one |
| `unsharded.py`, `ddp.py`, `fsdp.py`, `zero/` | the backends |
| `process_group.py`, `world.py` | collectives; joining and leaving the processes of a run |
"""

from ssam_scale import torch_compat  # noqa: F401 - refuses a torch that is too old, before anything looks for more

from .interface import (
    AscentReduction,
    Elements,
    Shard,
    ShardedPasses,
    ShardedState,
    ShardedWeights,
    Sharding,
    WrittenWeights,
)
from .place import place, released, sharding_of
from .process_group import ProcessGroup, leave_process_group
from .registry import BACKENDS, Backend
from .world import World, join_world

__all__ = [
    "BACKENDS",
    "AscentReduction",
    "Backend",
    "Elements",
    "ProcessGroup",
    "Shard",
    "ShardedPasses",
    "ShardedState",
    "ShardedWeights",
    "Sharding",
    "World",
    "WrittenWeights",
    "join_world",
    "leave_process_group",
    "place",
    "released",
    "sharding_of",
]
