"""What all ZeRO stages share: building a DeepSpeed engine, refusing settings, and running passes through the engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME
from torch import Tensor, nn

from ssam_scale.sharding.bucketed_all_reduce import AscentAllReduce
from ssam_scale.sharding.gradient_hooks import OnGradient, aligned_storage, observe_gradients
from ssam_scale.sharding.interface import AscentReduction
from ssam_scale.sharding.low_precision import cast_parameters
from ssam_scale.sharding.optimizer_trial import Handed
from ssam_scale.sharding.process_group import ProcessGroup
from ssam_scale.sharding.registry import Options

from .version import check_version

BACKWARD_INTERNALS = {"exit_backward": "a backward through a shared prefix enters two engine outputs but leaves one"}


def check_internals(owner: Any, internals: Mapping[str, str]) -> None:
    """Fail early, with a list, where this is not a DeepSpeed whose internals are known.

    Args:
        owner: an object of DeepSpeed's.
        internals: attributes of it that are used although they are not public, and why.

    Raises:
        UnsupportedVersionError: DeepSpeed's version is another, or an attribute is missing.
    """
    missing = [name for name in internals if not hasattr(owner, name)]
    check_version(deepspeed.__version__, f" ({type(owner).__name__} lacks {', '.join(missing)})" if missing else "")


def zero_engine(module: nn.Module, optimizer: torch.optim.Optimizer, stage: int, options: Options) -> nn.Module:
    """`deepspeed.initialize` with the settings that follow from how SparseSAM trains.

    Args:
        module: the model, on its device.
        optimizer: over its parameters.
        stage: of ZeRO, 0 to 3.
        options: of the training.

    Raises:
        ValueError: DeepSpeed does not take the configuration, or it sets what the other options say.
    """
    sections = dict(options.deepspeed)
    zero = dict(sections.pop("zero_optimization", {}))
    said = {
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "gradient_clipping": options.max_grad_norm or 0.0,  # left out it is 1.0 since 0.19.3
        "zero_allow_untested_optimizer": True,
    }
    twice = [key for key in sections if key in {*said, "optimizer"}]
    if "stage" in zero:
        twice.append("zero_optimization.stage")
    if twice:
        raise ValueError(f"leave {', '.join(twice)} out of DeepSpeed's configuration: other arguments say it")
    settings = {
        "steps_per_print": sys.maxsize,  # one line every ten steps otherwise
        "timers": {"throughput": {"enabled": False}},  # waits for the device at every forward and step
        **sections,
        **said,
        "zero_optimization": {**zero, "stage": stage},
    }
    if stage == 3:
        for p in cast_parameters(module, options.precision):
            # Asked for by each gather of stage 3. Reductions ask only where `torch_autocast` is on, too.
            setattr(p, PARAM_COMM_DTYPE_ATTR_NAME, options.precision)
    try:
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    except (ValueError, AssertionError, NotImplementedError, ImportError, deepspeed.DeepSpeedConfigError) as error:
        raise ValueError(f"DeepSpeed does not take its configuration: {_short(error)}") from error
    assert isinstance(engine, nn.Module)
    if not sections.get("torch_autocast"):
        _OuterAutocast(engine, module)
    return engine


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class _OuterAutocast:
    """Carries a `torch.autocast` around the engine's forward into it: DeepSpeed turns one off that is not its own.

    Its own (`torch_autocast`) would also communicate the gradients in low precision.
    """

    def __init__(self, engine: nn.Module, module: nn.Module) -> None:
        self._device = next(module.parameters()).device.type
        self._outside: torch.dtype | None = None
        self._inside = ExitStack()
        engine.register_forward_pre_hook(self._note)
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _note(self, engine: nn.Module, inputs: Any) -> None:
        on = torch.is_autocast_enabled(self._device)
        self._outside = torch.get_autocast_dtype(self._device) if on else None

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if self._outside is not None:
            self._inside.enter_context(torch.autocast(self._device, self._outside))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._inside.close()


def check_setup(engine: Any) -> None:
    """Refuse what has not been tried or cannot work.

    Raises:
        ValueError: lists the settings.
    """

    def on(offload: Any) -> bool:
        return offload is not None and offload.device != "none"

    wrapped = engine.optimizer is not engine.basic_optimizer
    base = getattr(engine.optimizer, "optimizer", None) if wrapped else engine.basic_optimizer
    refused = {
        "an engine without an optimizer": engine.basic_optimizer is None,
        "an optimizer that DeepSpeed replaces by one of its own (Adagrad)": base is not engine.basic_optimizer,
        "a pipeline engine": isinstance(engine, deepspeed.PipelineEngine),
        "model, tensor, sequence or expert parallelism": engine.seq_dp_world_size != dist.get_world_size()
        or engine.dp_world_size != dist.get_world_size()
        or engine.has_moe_layers,
        # github.com/deepspeedai/DeepSpeed/pull/8393: it unscales gradients of a loss that it has not scaled.
        "fp16 with ZeRO stage 0, where DeepSpeed does not scale the loss (stage 1 does)": engine.fp16_enabled()
        and engine.zero_optimization_stage() == 0,
        "managed_gradient_accumulation: false": not engine.managed_gradient_accumulation(),
        "zero_optimization.offload_optimizer": on(engine.zero_offload_optimizer()),
        "zero_optimization.offload_param": on(engine.zero_offload_param()),
        "zero_optimization.zero_hpz_partition_size above 1": engine.zero_hpz_partition_size() > 1,
        "zero_optimization.zero_quantized_weights": engine.zero_quantized_weights(),
        "zero_optimization.zero_quantized_gradients": engine.zero_quantized_gradients(),
        "zero_optimization.zenflow": engine.zenflow_config() is not None,
        "compile.deepcompile": engine.is_deepcompile_enabled(),
        # Its timers may be started once a backward, and a backward through a shared prefix starts them twice.
        "wall_clock_breakdown": engine.wall_clock_breakdown(),
    }
    if reasons := [name for name, found in refused.items() if found]:
        raise ValueError(f"SparseSAM on a DeepSpeed engine does not support {'; '.join(reasons)}")


class DeepSpeedTraining:
    """Forward, backward, clipping and step of every stage are the engine's.

    Where every rank holds whole weights (stages 0 to 2) the gradients of an ascent are reduced here and not by the
    engine, which reduces whole gradients and, where the optimizer steps shards, leaves each rank its shard alone.

    Attributes:
        survives_interruption: whether the engine can go on after an exception inside a backward; else its reductions
            are half done, and nothing takes them back.
    """

    supports_grad_scaler = leaves_grad = accumulates_in_grad = False
    packs_gradients = False
    reduces_whole = False
    hands: Handed = "tensors"
    weights_replicated: bool
    survives_interruption = True

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._interrupted = False
        self._all_reduce: AscentAllReduce | None = None
        self.network: nn.Module = engine.module
        self.ascent_module: nn.Module = engine
        self.descent_module: nn.Module = engine
        self.data_parallel_group = ProcessGroup(dist.group.WORLD)

    def reduce_ascents(self) -> None:
        """Reduce the gradients of ascents here from now on, if there is another rank."""
        if self.data_parallel_group.size > 1:
            self._all_reduce = AscentAllReduce(dist.group.WORLD, self._engine.communication_data_type)
            self.packs_gradients = True

    def groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters that the optimizer steps, by group."""
        groups = self._engine.basic_optimizer.param_groups
        return [[p for p in group["params"] if p.requires_grad] for group in groups]

    def unwrap_optimizer(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> tuple[torch.optim.Optimizer, list[list[nn.Parameter]]]:
        """The optimizer that the engine steps, and the model's parameters that it was given, by group."""
        engine = self._engine
        if optimizer is not engine.optimizer and optimizer is not engine.basic_optimizer:
            raise ValueError("the optimizer is not the one that the DeepSpeed engine was initialised with")
        clipping = engine.gradient_clipping()
        if max_grad_norm is not None and max_grad_norm != clipping:
            raise ValueError(
                f"max_grad_norm is {max_grad_norm} but the DeepSpeed engine clips, with gradient_clipping {clipping}; "
                "set it in the DeepSpeed configuration (0.0 is off; left out it is 1.0) and leave max_grad_norm at None"
            )
        groups = self.groups()
        if len(engine.basic_optimizer.param_groups) != len(groups):
            raise ValueError("DeepSpeed takes parameter groups only before deepspeed.initialize")
        return engine.basic_optimizer, groups

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """The engine is told where accumulation ends, instead of counting calls of `step`.

        Raises:
            RuntimeError: the engine cannot go on.
        """
        if self._interrupted and not self.survives_interruption:
            raise RuntimeError(
                "an exception interrupted a backward pass, after which this DeepSpeed engine cannot go on: the weights "
                "are as they were, so save a checkpoint and load it into a new engine"
            )
        self._engine.set_gradient_accumulation_boundary(last)
        if last and self._all_reduce is not None:
            self._all_reduce.expect_last()
        yield

    def backward(self, loss: Tensor) -> None:
        """The engine's; the loss is already divided by the number of micro-batches."""
        self._interrupted = True
        self._engine.backward(loss, scale_wrt_gas=False)
        if self._all_reduce is not None:
            self._all_reduce.finish()
        self._interrupted = False

    def loss_scale(self) -> float:
        """The engine's in fp16, else 1."""
        scale = getattr(self._engine.optimizer, "scale_if_loss", None)
        if scale is None:
            return 1.0
        with torch.enable_grad():  # it scales only what can be differentiated
            return float(scale(torch.ones((), requires_grad=True) * 1.0).detach())

    @contextmanager
    def capture_gradients(self, parameters: Sequence[nn.Parameter], on_gradient: OnGradient) -> Iterator[None]:
        """Observes them before the engine does, which reduces them as in any backward.

        Keeps the accumulation boundary. Views of a flat buffer stand elsewhere inside, so do not ask for shards there.
        """
        boundary = getattr(self._engine, "_is_gradient_accumulation_boundary", True)  # None: the engine counts
        views = self.network.parameters() if self.weights_replicated else []
        try:
            with aligned_storage(views), observe_gradients(parameters, on_gradient):
                yield
        finally:
            self._engine.set_gradient_accumulation_boundary(boundary)

    @contextmanager
    def ascent(self, reduction: AscentReduction) -> Iterator[None]:
        """Bucketed all-reduce of what is asked for; or the engine averages what gradients there are, in full."""
        if self._all_reduce is None:
            yield
            return
        with self._without_reduction(), self._all_reduce.of(reduction):
            yield

    def _without_reduction(self) -> AbstractContextManager[None]:
        """Backwards inside leave gradients as they are in `.grad`."""
        unreduced: AbstractContextManager[None] = self._engine.no_sync()
        return unreduced

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop `.grad`."""
        self._engine.zero_grad()

    def step(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, scaler: torch.amp.GradScaler | None
    ) -> None:
        """The engine's step: it clips, steps the optimizer, and gathers the weights."""
        self._engine.step()


class ZeROTraining(DeepSpeedTraining):
    """Passes of stages 1 to 3, whose optimizer DeepSpeed wraps in one that reduces and partitions.

    Args:
        engine: that DeepSpeed returned.
        internals: of its optimizer, as `check_internals` takes them.
    """

    survives_interruption = False
    hands: Handed = "pieces"

    def __init__(self, engine: Any, internals: Mapping[str, str]) -> None:
        super().__init__(engine)
        check_internals(engine.optimizer, internals)
        self._zero = engine.optimizer

    def backward(self, loss: Tensor) -> None:
        """The engine's, which through a shared prefix enters a backward twice and leaves it once: leaves it again."""
        super().backward(loss)
        self._zero.exit_backward()  # does nothing after a backward that left as often as it entered


def release(engine: Any) -> None:
    """Let go of all that an engine holds, which is not to be used again.

    Its hooks hold it, and are held by nodes of autograd's, where Python looks for no cycles. Some of stage 3 cannot
    be removed, so that its module stays for ever: without its weights.
    """
    module, optimizer = engine.module, engine.optimizer
    engine.destroy()
    for parameter in module.parameters():
        if hasattr(parameter, "ds_tensor"):
            parameter.data = parameter.ds_tensor = torch.empty(0)
            parameter.grad = None
    vars(optimizer).clear()
    vars(engine).clear()
