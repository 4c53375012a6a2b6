"""The savings of a step: one switch for each kind of work that a sparse mask makes unnecessary."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ssam_scale.checks import check_switch


@dataclass(frozen=True)
class Savings:
    """Switches for the work that a step leaves out because its mask leaves weights alone; each works by itself.

    With the whole batch in the ascent (`Fresh(fraction=1)`) none changes what a step computes. One that a backend has
    no use for does nothing there.

    Attributes:
        elide: no ascent gradient of what is not perturbed: not of whole tensors, nor of rows of linear layers and
            convolutions. It is neither computed nor reduced, and nothing is saved for it in the forward.
        share_prefix: the blocks before the first perturbed one run once and serve both passes.
        pack: of the ascent gradient, and of perturbed weights, only what is perturbed is sent to other processes.
        keep_gathered: sharded weights that are not perturbed stay gathered from the ascent pass to the descent pass,
            which saves sending them again and costs the memory of them.
        graph_ascent: on a GPU, where each process holds all weights (one alone, or DDP), an ascent on part of the batch
            runs the network as two CUDA graphs, captured when a cut is met first, which keep the memory of its
            activations and gradients.

    Raises:
        TypeError: a switch is neither True nor False.
    """

    elide: bool = True
    share_prefix: bool = True
    pack: bool = True
    keep_gathered: bool = False
    graph_ascent: bool = False

    def __post_init__(self) -> None:
        for switch in fields(self):
            check_switch(f"savings.{switch.name}", getattr(self, switch.name))
