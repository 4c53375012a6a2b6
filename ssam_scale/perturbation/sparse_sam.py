"""SparseSAM: Sharpness-Aware Minimization that perturbs part of the weights, as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ssam_scale.masks import Dense, Depth, Mask, Plan, Scored, add_squares
from ssam_scale.sharding import sharding_of

from .arithmetic import mask_, scale_to_radius_, sum_of_squares
from .batchnorm import evaluation_mode, frozen_statistics
from .passes import LossFn, Passes, without_gradient
from .phases import Phases, no_phases
from .pool import samples_of, weight_pool


class SparseSAM(torch.optim.Optimizer):
    """Perturb the masked weights towards higher loss, take the gradient there, step the base optimizer from w.

        opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, mask=Depth())
        loss = opt.step(lambda forward, batch: F.cross_entropy(forward(batch[0]), batch[1]), batch)

    The loss function is given a `forward` to call in the place of the model, once for each pass, and returns the mean
    loss without calling backward; further batches are micro-batches whose gradients accumulate. That form is the one
    that skips what a mask leaves alone. A plain closure in torch's style (no argument, calls backward itself) works
    too and pays for two full passes; so does doing it by hand:

        loss_at_w.backward()
        with opt.perturbed():
            loss_at_the_perturbed_weights().backward()
        opt.step()

    The perturbation is ε = ρ · (m ⊙ g) / ‖g‖ (`norm="dense"`, SSAM, arXiv 2210.05177) or ρ · (m ⊙ g) / ‖m ⊙ g‖
    (`norm="masked"`, all that a sparse ascent can know), g the gradient of the global batch. The weights come back by
    copy, also when the second pass raises. `param_groups` and `state` are the base optimizer's.

    Args:
        model: a module, `DistributedDataParallel`, an FSDP2 root or a DeepSpeed engine, each plain or around a
            `StagedModel` (which a mask with a cut needs); or parameters, for the closure form on one process.
        base_optimizer: an optimizer over parameters of `model`; these are the weights that can be perturbed. With a
            DeepSpeed engine, the one it was given or the one it returned.
        rho: radius ρ ≥ 0; with 0 there is no ascent and each step is the base optimizer's.
        mask: which weights are perturbed; None: all of them.
        norm: what the gradient is divided by.
        max_grad_norm: the descent gradient is clipped to this norm. A DeepSpeed engine clips to its own
            `gradient_clipping`; None accepts that.
        phases: measures the parts of the step.

    Raises:
        ValueError: rho is negative, the optimizer has parameters that are not the model's, or the model's sharding is
            not supported.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Parameter],
        base_optimizer: torch.optim.Optimizer,
        *,
        rho: float = 0.05,
        mask: Mask | None = None,
        norm: Literal["dense", "masked"] = "masked",
        max_grad_norm: float | None = None,
        phases: Phases = no_phases,
    ) -> None:
        if rho < 0.0:
            raise ValueError(f"rho is {rho}; a radius of at least 0 is needed")
        if norm not in ("dense", "masked"):
            raise ValueError(f"norm is {norm!r}; 'dense' or 'masked' is needed")
        if norm == "dense" and isinstance(mask, Depth):
            raise ValueError(
                "norm 'dense' needs the gradient of the prefix, which a Depth mask never computes; use 'masked'"
            )
        self.sharding = sharding_of(model if isinstance(model, nn.Module) else nn.ParameterList(model))
        base_optimizer, trained = self.sharding.trained(base_optimizer, max_grad_norm)
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self.base_optimizer = base_optimizer
        self.rho = rho
        self.mask: Mask = mask if mask is not None else Dense()
        self.norm = norm
        self.max_grad_norm = max_grad_norm
        self.steps = 0
        self._phases = phases
        self._parameters, self._layout = weight_pool(self.sharding, trained)

    # Asked for each time, because loading a state gives an optimizer new lists and dictionaries.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's."""
        return self.base_optimizer.param_groups if "base_optimizer" in self.__dict__ else self._given_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._given_groups = groups  # torch's constructor

    @property
    def state(self) -> Any:
        """The base optimizer's."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        pass  # torch's constructor

    @property
    def plan(self) -> Plan:
        """What the next step perturbs."""
        return self.mask.plan(self._layout, self.steps)

    @property
    def density(self) -> float:
        """The share of the weights that the next step perturbs; 0 where rho is 0."""
        return self.plan.perturbed / self._layout.total if self.rho else 0.0

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None, *batches: Any) -> Any:
        """One step.

        Args:
            closure: with batches, `loss_fn(forward, batch) -> mean loss`; without, a function that computes the loss
                and calls backward; None steps the base optimizer with the gradients that are there.
            batches: the micro-batches of this process, of equal size.

        Returns:
            The loss at w (over this process's batches, detached), or what the closure returned at w.
        """
        if closure is None:
            loss = None
        elif batches:
            loss = self._step_batches(closure, batches)
        else:
            loss = self._step_closure(closure)
        with self._phases("optimizer"):
            self.sharding.step(self.base_optimizer, self.max_grad_norm)
            if closure is not None:
                self.zero_grad()
        self.steps += 1
        return loss

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """The weights are w + ε inside and w again afterwards, bit for bit, whatever happens inside.

        The ascent gradient is taken from `.grad`, which is empty inside at first and holds the descent gradient at the
        end. On DDP and FSDP2 it must have been reduced, as a synchronised backward leaves it.
        """
        with self._phases("perturb"), torch.no_grad():
            weights, epsilon = self._perturbation()
            backup = [w.clone() for w in weights]
        try:
            with self._phases("perturb"), torch.no_grad():
                torch._foreach_add_(weights, epsilon)
                del epsilon
                self.zero_grad()
                self._publish()
            yield
        finally:
            with self._phases("perturb"), torch.no_grad():
                torch._foreach_copy_(weights, backup)
                self._publish()

    @torch.no_grad()
    def refresh(self, loss_fn: LossFn, *batches: Any) -> None:
        """Choose the weights anew by the Fisher score of `batches`: Σ over samples of the squared per-sample gradient.

        Runs in evaluation mode and leaves no trace in the model. Every process scores the samples of all processes, one
        at a time, which makes the result the same under any sharding at the price of small passes only.

        Args:
            loss_fn: mean loss of a batch, given the forward to use; called with batches of one sample.
            batches: this process's samples: tensors, or nested containers of tensors, whose first dimension counts
                samples; the same number of them on every process.

        Raises:
            TypeError: the mask is not chosen by scores.
            FloatingPointError: a score is not finite; the mask stays what it was.
            ValueError: there is no sample, or the mask selects nothing.
        """
        if not isinstance(self.mask, Scored):
            raise TypeError(f"a {type(self.mask).__name__} mask is not chosen by scores: there is nothing to refresh")
        if not batches:
            raise ValueError("refresh needs at least one batch of samples")
        parameters = list(self._parameters.values())
        scores = [torch.zeros_like(s.weight, dtype=torch.float32) for s in self.sharding.shards(parameters)]
        module = self.sharding.ascent_module
        self.zero_grad()
        try:
            with evaluation_mode(self.sharding.network):
                for batch in batches:
                    everyone = tree_map(self.sharding.gather_samples, batch)
                    for sample in samples_of(everyone):
                        with torch.enable_grad(), self.sharding.micro_batch(last=True):
                            self.sharding.backward(loss_fn(module, sample))
                        add_squares(scores, self.sharding.gradients(parameters))
                        self.zero_grad()
        finally:
            self.zero_grad()
            self.sharding.publish()
        self.mask.select(self._layout, dict(zip(self._parameters, scores, strict=True)), self.sharding)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the base optimizer's parameters, also where a backend keeps its own."""
        self.sharding.clear_gradients(self.base_optimizer)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model to the base optimizer and to the weights that can be perturbed."""
        if not hasattr(self, "base_optimizer"):  # torch's constructor, before there is anything to add to
            super().add_param_group(param_group)
            return
        self.base_optimizer.add_param_group(param_group)
        trained = self.sharding.trained(self.base_optimizer, self.max_grad_norm)[1]
        self._parameters, self._layout = weight_pool(self.sharding, trained)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, the step count, and the mask (whole tensors: collective where they are sharded).

        With DeepSpeed's stages 1 to 3 the base optimizer's state is this process's flat pieces and belongs to the
        engine: save with `engine.save_checkpoint(..., client_state=opt.sparse_state())` instead.
        """
        return {**self.base_optimizer.state_dict(), "sparse_sam": self.sparse_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, on any number of processes."""
        own = dict(state_dict)
        self.load_sparse_state(own.pop("sparse_sam"))
        self.base_optimizer.load_state_dict(own)

    def sparse_state(self) -> dict[str, Any]:
        """What SparseSAM itself must remember: `steps`, and of a scored mask `perturbed` and `mask`.

        `mask` has whole boolean tensors by parameter name, None for a tensor perturbed as a whole. Collective.
        """
        plan = self.mask.selected if isinstance(self.mask, Scored) else None
        if plan is None:
            return {"steps": self.steps}
        mask = {
            name: None if local is None else self.sharding.gather(self._parameters[name], local)
            for name, local in plan.weights.items()
        }
        return {"steps": self.steps, "perturbed": plan.perturbed, "mask": mask}

    def load_sparse_state(self, state: dict[str, Any]) -> None:
        """Take back what `sparse_state` returned, on any number of processes.

        Raises:
            ValueError: the state has a mask and this optimizer's mask is not chosen by scores.
        """
        self.steps = int(state["steps"])
        if "mask" not in state:
            return
        if not isinstance(self.mask, Scored):
            raise ValueError(
                f"the saved state has a mask chosen by scores, this optimizer a {type(self.mask).__name__}"
            )
        local: dict[str, Tensor | None] = {
            name: None if whole is None else self.sharding.scatter(self._parameters[name], whole)
            for name, whole in state["mask"].items()
        }
        self.mask.restore(Plan(0, local, int(state["perturbed"])))

    def _publish(self) -> None:
        self.sharding.publish()
        # Autocast remembers the low-precision copies of weights until its outermost context ends, which may be around
        # the whole step.
        torch.clear_autocast_cache()

    def _step_closure(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            if self.rho == 0.0:
                return closure()
            loss = closure()
            with self.perturbed(), frozen_statistics(self.sharding.network):
                closure()
        return loss

    def _step_batches(self, loss_fn: LossFn, batches: tuple[Any, ...]) -> Tensor:
        plan = self.plan
        self.zero_grad()  # what an exception in an earlier step left behind
        passes = Passes(self.sharding, plan.cut if self.rho else 0, loss_fn, batches, self._phases)
        with torch.enable_grad():
            if self.rho == 0.0:
                return passes.descend(statistics=True)
            with without_gradient(self._elided(plan)):
                loss = passes.ascend()
            with self._phases("ascent backward"):
                needed = self._parameters if self.norm == "dense" else plan.weights
                self.sharding.reduce_ascent([self._parameters[name] for name in needed])
            with self.perturbed():
                passes.descend(statistics=False)
        return loss

    def _elided(self, plan: Plan) -> list[nn.Parameter]:
        """The parameters of the suffix whose ascent gradient nobody needs; the prefix is cut off by itself."""
        if self.norm == "dense":
            return []
        stages = self._layout.stages
        return [p for name, p in self._parameters.items() if name not in plan.weights and stages[name] >= plan.cut]

    def _perturbation(self) -> tuple[list[Tensor], list[Tensor]]:
        """The local tensors to perturb and their ε, made in place of their gradients."""
        plan = self.plan
        perturbed = [self._parameters[name] for name in plan.weights]
        gradients = self.sharding.gradients(perturbed)
        if self.norm == "dense":
            squares = sum_of_squares(self.sharding.gradients(list(self._parameters.values())))
        mask_(gradients, list(plan.weights.values()))
        if self.norm == "masked":
            squares = sum_of_squares(gradients)
        norm = self.sharding.sum_over_shards(squares).sqrt()
        scale_to_radius_(gradients, self.rho, norm)
        return [shard.weight for shard in self.sharding.shards(perturbed)], gradients
