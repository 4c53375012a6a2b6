"""The samples of all processes in one order, distributed round robin: sample i goes to process i mod size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ssam_scale.sharding import ProcessGroup

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def round_robin_samples(group: ProcessGroup, batches: Iterable[Any], samples: int | None) -> tuple[list[Any], int]:
    """This process's share of the samples of all processes. Collective.

    The order of all samples is that of the first batch of process 0, 1, …, then that of the second batch of process 0,
    and so on; it is the order that one process sees which is given the processes' batches concatenated. Sample i goes
    to process i mod (number of processes). Nothing else is sent, so that a process holds its share of the samples and,
    until all agree that they can begin, those of its own batches that are used.

    Args:
        group: all data-parallel ranks.
        batches: of this process: tensors, or nested containers of tensors, whose first dimension counts samples; plain
            values beside tensors are part of every sample. Not asked for more batches than are needed, and a batch is
            copied before the next one is asked for.
        samples: how many to use, from the first on; None: all.

    Returns:
        Batches of one sample, equally many on every process: number j is sample j · (number of processes) + rank. Where
        the samples do not come out even, the last is a repeated one.
        Then the number of samples over all processes.

    Raises:
        ValueError: there is no sample or too few, a batch cannot be cut into samples, or the processes' batches differ
            in number, size, structure, dtypes or shapes. The same on every process, like
        RuntimeError: asking for a batch raised on another process; on the one where it did, what it raised.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples is {samples}; at least 1 is needed")
    local, kinds, failure = [], [], None
    used = 0
    try:
        for batch in batches:
            local.append(_LocalBatch(batch, group, used, samples))
            kinds.append(local[-1].kind)
            used += local[-1].each * group.size
            if samples is not None and used >= samples:
                break
    except Exception as error:
        failure = error
    _agree(group, kinds, failure)
    total = used if samples is None else min(used, samples)
    if samples is not None and used < samples:
        raise ValueError(f"{samples} samples are asked for but the batches of all processes hold {used}")
    if not total:
        raise ValueError("scores need at least one sample")
    spare = next(batch.first for batch in local if batch.first is not None)
    own = [sample for batch in local for sample in batch.exchange()]
    if len(own) * group.size < total:
        own.append(own[-1] if own else spare)
    return own, total


def _agree(group: ProcessGroup, kinds: list[Any], failure: Exception | None) -> None:
    said = group.all_gather_object((kinds, None if failure is None else f"{failure}", isinstance(failure, ValueError)))
    if failure is not None and not isinstance(failure, ValueError):
        raise failure
    for rank, (_, message, expected) in enumerate(said):
        if message is not None:
            raise ValueError(message) if expected else RuntimeError(f"process {rank} has no samples: {message}")
    for rank, (theirs, _, _) in enumerate(said):
        if len(theirs) != len(said[0][0]):
            raise ValueError(
                f"process 0 has {len(said[0][0])} batches of samples but process {rank} has {len(theirs)}; the same "
                "number is needed on every process"
            )
        for number, (mine, other) in enumerate(zip(said[0][0], theirs, strict=True)):
            if mine != other:
                raise ValueError(
                    f"batch {number} is {_words(mine)} on process 0 but {_words(other)} on process {rank}; the same "
                    "is needed on every process"
                )


def _words(kind: tuple[int, str, tuple[str, ...]]) -> str:
    return f"{kind[0]} samples of {', '.join(kind[2])}"


class _LocalBatch:
    """One batch of this process: a copy of what is used of it, in the order of where it goes.

    Attributes:
        each: samples of this batch on every process.
        kind: what must be the same on every process.
        first: its first sample, as a batch of one; None: it has none.

    Raises:
        ValueError: it cannot be cut into samples.
    """

    def __init__(self, batch: Any, group: ProcessGroup, before: int, samples: int | None) -> None:
        leaves, self._structure = tree_flatten(batch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors:
            raise ValueError("a batch of samples holds no tensor")
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                raise ValueError(f"a batch of samples holds a {type(leaf).__name__}; tensors are needed")
            if isinstance(leaf, Tensor) and leaf.ndim == 0:
                raise ValueError("a batch of samples holds a tensor without dimensions; the first counts samples")
        sizes = sorted({len(t) for t in tensors})
        if len(sizes) > 1:
            raise ValueError(f"a batch holds tensors of {sizes[0]} and of {sizes[-1]} samples")
        [self.each] = sizes
        self._group, self._before, self._samples = group, before, samples
        self.kind = self.each, repr(self._structure), tuple(_kind(leaf) for leaf in leaves)
        order = torch.tensor(self._places(group.rank, range(group.size)), dtype=torch.int64)
        self._leaves = [leaf.detach()[order.to(leaf.device)] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.first = None
        if self.each:
            self.first = self._sample([t[:1].clone() if isinstance(t, Tensor) else t for t in leaves], 0)

    def _places(self, of: int, to: Iterable[int]) -> list[int]:
        """Places in the batch of process `of` of the samples that go to processes `to`, in that order."""
        start = self._before + of * self.each
        used = self.each if self._samples is None else max(0, min(self.each, self._samples - start))
        return [place for rank in to for place in range((rank - start) % self._group.size, used, self._group.size)]

    def exchange(self) -> list[Any]:
        """This process's samples of this batch of all processes; forgets the copy. Collective."""
        ranks = range(self._group.size)
        sent = [len(self._places(self._group.rank, [rank])) for rank in ranks]
        received = [len(self._places(rank, [self._group.rank])) for rank in ranks]
        leaves, self._leaves = self._leaves, []
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                width = leaf[:1].numel() if len(leaf) else leaf.shape[1:].numel()
                parts = self._group.all_to_all(
                    leaf.reshape(-1), [n * width for n in sent], [n * width for n in received]
                )
                leaves[index] = torch.cat(list(parts)).reshape(-1, *leaf.shape[1:])
        return [self._sample(leaves, index) for index in range(sum(received))]

    def _sample(self, leaves: Sequence[Any], index: int) -> Any:
        # A copy: a kernel may compute in another order where the memory begins at another address.
        cut = [leaf[index : index + 1].clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tree_unflatten(cut, self._structure)


def _kind(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape[1:])}"
