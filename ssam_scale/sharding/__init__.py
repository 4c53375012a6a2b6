"""Where the weights live: one interface, one file a backend."""

from .interface import Needed, Shard, Sharding, Written
from .place import Backend, distribute, place, sharding_of
from .world import Peers, World, join_world, leave_process_group

__all__ = [
    "Backend",
    "Needed",
    "Peers",
    "Shard",
    "Sharding",
    "World",
    "Written",
    "distribute",
    "join_world",
    "leave_process_group",
    "place",
    "sharding_of",
]
