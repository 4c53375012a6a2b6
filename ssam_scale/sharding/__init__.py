"""Where the weights live: one interface, one file a backend."""

from .interface import Needed, Shard, Sharding, Written
from .place import place, sharding_of
from .registry import Backend, BackendInfo, backends
from .world import Peers, World, join_world, leave_process_group

__all__ = [
    "Backend",
    "BackendInfo",
    "Needed",
    "Peers",
    "Shard",
    "Sharding",
    "World",
    "Written",
    "backends",
    "join_world",
    "leave_process_group",
    "place",
    "sharding_of",
]
