"""The gradients of a descent, to be changed before the base optimizer steps by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ssam_scale.sharding import Sharding


def live_gradients(
    sharding: Sharding, parameters: Mapping[str, nn.Parameter], names: Iterable[str], what: str
) -> tuple[list[str], list[Tensor]]:
    """Of these parameters those that a pass has left a gradient of, and this process's part of each, as it lies there.

    Args:
        sharding: where the weights live.
        parameters: by name.
        names: of some.
        what: changes the gradients, for the message.

    Raises:
        ValueError: the backend shows copies of its gradients, to which nothing can be added.
    """
    reached = [name for name in names if not sharding.leaves_grad or parameters[name].grad is not None]
    chosen = [parameters[name] for name in reached]
    gradients, again = sharding.gradients(chosen), sharding.gradients(chosen)
    if any(a.data_ptr() != b.data_ptr() for a, b in zip(gradients, again, strict=True) if a.numel()):
        raise ValueError(f"{what} needs float32 gradients with ZeRO stage 3, which copies others")
    return reached, gradients
