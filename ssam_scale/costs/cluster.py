"""A cluster, how the weights lie on it, and how long communication takes there."""

from __future__ import annotations

from dataclasses import dataclass

from ssam_scale.config.deepspeed import REDUCE_BUCKET
from ssam_scale.sharding import BACKENDS
from ssam_scale.sharding.collectives import ring_bytes


@dataclass(frozen=True)
class Cluster:
    """Where a step runs.

    Attributes:
        gpus: processes, one a GPU.
        per_node: GPUs of one node.
        node_bandwidth: bytes per second that one GPU sends inside of its node.
        network_bandwidth: bytes per second that one GPU sends to another node.
    """

    gpus: int
    per_node: int
    node_bandwidth: float
    network_bandwidth: float


@dataclass(frozen=True)
class Group:
    """The processes of one collective.

    Attributes:
        size: how many they are.
        leaves_node: whether some are on other nodes.
    """

    size: int
    leaves_node: bool


@dataclass(frozen=True)
class ZeroSettings:
    """What of DeepSpeed's `zero_optimization` changes bytes or memory; its defaults.

    Attributes:
        reduce_bucket: elements of the buffer that stages 1 to 3 reduce gradients in.
        persistent: elements of the largest parameter that stage 3 keeps gathered.
        reuse: elements that are used between a parameter's forward and backward for stage 3 to free it.
        prefetch: elements that stage 3 gathers ahead.
    """

    reduce_bucket: int = REDUCE_BUCKET
    persistent: int = 100_000
    reuse: int = 1_000_000_000
    prefetch: int = 50_000_000


@dataclass(frozen=True)
class Placement:
    """How the weights lie on a cluster.

    Attributes:
        backend: how.
        replicas: copies of the weights that `fsdp2` keeps, each over consecutive ranks.
        cluster: where.
        zero: settings of the backends `zero1` to `zero3`.

    Raises:
        ValueError: the backend or the number of replicas does not go with the number of GPUs.
    """

    backend: str
    replicas: int
    cluster: Cluster
    zero: ZeroSettings = ZeroSettings()

    def __post_init__(self) -> None:
        gpus = self.cluster.gpus
        if BACKENDS[self.backend].value.launchers is None and gpus > 1:
            raise ValueError(f"backend {self.backend} on {gpus} GPUs; use ddp or fsdp2")
        if gpus % self.replicas:
            raise ValueError(f"{gpus} GPUs cannot hold {self.replicas} replicas")

    @property
    def shards(self) -> int:
        """Processes that perturbing one copy of the weights, and the optimizer's step, are sharded over."""
        return self.cluster.gpus // self.replicas if BACKENDS[self.backend].value.shards_weights else 1

    @property
    def world(self) -> Group:
        """All processes."""
        return Group(self.cluster.gpus, self.cluster.gpus > self.cluster.per_node)

    @property
    def shard_group(self) -> Group:
        """The processes of one copy."""
        return Group(self.shards, self.shards > self.cluster.per_node)

    @property
    def replica_group(self) -> Group:
        """The processes with the same part of different copies."""
        return Group(self.replicas, self.cluster.gpus > self.cluster.per_node)


@dataclass(frozen=True)
class Sent:
    """One collective, or several of a kind: the whole tensors' bytes together."""

    collective: str
    whole: float
    group: Group

    @property
    def bytes(self) -> float:
        """What each process sends."""
        return ring_bytes(self.collective, self.whole, self.group.size)

    def seconds(self, cluster: Cluster) -> float:
        """Over the slowest link of the group."""
        return self.bytes / (cluster.network_bandwidth if self.group.leaves_node else cluster.node_bandwidth)


@dataclass(frozen=True)
class Segment:
    """A segment of a step: compute, and the communication that can overlap with it."""

    computes: float
    sends: tuple[Sent, ...] = ()

    @property
    def bytes(self) -> float:
        """What each process sends."""
        return sum(sent.bytes for sent in self.sends)

    def seconds(self, cluster: Cluster, *, hidden: bool = True) -> float:
        """How long it takes, on these assumptions."""
        sending = sum(sent.seconds(cluster) for sent in self.sends)
        return max(self.computes, sending) if hidden else self.computes + sending
