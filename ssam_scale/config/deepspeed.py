"""What becomes of each key of a DeepSpeed configuration: taken by DeepSpeed, said by other keys of ours, or refused.

Under `sharding.deepspeed`, or in a file of DeepSpeed's own, people write what they have: batch sizes, precision,
optimizer, scheduler. Here they are said by the run's configuration, which holds under every backend. So each key is

- taken: it goes to DeepSpeed (`taken`);
- in agreement: it says what the configuration says, or leaves it to it, as `"auto"` and `null` do; or
- a problem: a line that says which key of ours says it, or why it cannot be (`problems`).

`RULES` has every key that DeepSpeed 0.19 looks at, and those that it used to look at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .micro_batches import MicroBatches
from .section import KeyPath
from .spelling import nearest

if TYPE_CHECKING:
    from .schema import Config

REDUCE_BUCKET = 500_000_000
"""Elements of the buffer that stages 1 to 3 reduce gradients in, unless `reduce_bucket_size` says otherwise."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a key: its path in DeepSpeed's configuration, and a text that follows its name."""

    path: KeyPath
    text: str


Check = Callable[[Any, KeyPath, "Config"], Iterator[Problem]]


@dataclass(frozen=True)
class Rule:
    """What becomes of one key.

    Attributes:
        kind: what its value is, one of `_KINDS`.
        taken: whether it goes to DeepSpeed.
        check: what can be wrong with it.
        keys: of a section, what becomes of each of its keys; None: there may be any.
    """

    kind: str
    taken: bool = True
    check: Check | None = None
    keys: Mapping[str, Rule] | None = None


def problems(sections: Mapping[str, Any], config: Config) -> list[Problem]:
    """Everything that keeps a DeepSpeed configuration from going with a run's, in the order of its keys.

    Args:
        sections: DeepSpeed's.
        config: the run's, whose own `sharding.deepspeed` is not looked at.
    """
    backend = config.sharding.backend
    if not backend.startswith("zero"):
        zero = sections.get("zero_optimization")
        stage = zero.get("stage") if isinstance(zero, Mapping) else zero
        if backend != "auto" or _is_left_out(stage):
            hint = "; say zero_optimization.stage, or sharding.backend=zero2" if backend == "auto" else ""
            return [Problem((), f"is for the backends zero0 to zero3, and backend is {backend}{hint}")]
    found = [*_walk(sections, _ALL, (), config), *batch_problems(sections, config)]
    order = {str(key): index for index, key in enumerate(sections)}
    return sorted(found, key=lambda problem: order[str(problem.path[0])])


def taken(sections: Mapping[str, Any]) -> dict[str, Any]:
    """What of a DeepSpeed configuration goes to DeepSpeed."""
    found: dict[str, Any] = _taken(sections, _ALL)
    return found


def stage_of(sections: Any) -> int | None:
    """The stage of ZeRO that a DeepSpeed configuration asks for, if it is one."""
    zero = sections.get("zero_optimization") if isinstance(sections, Mapping) else None
    stage = zero.get("stage") if isinstance(zero, Mapping) else None
    return stage if isinstance(stage, int) and not isinstance(stage, bool) and stage in _STAGES else None


def batch_problems(sections: Mapping[str, Any], config: Config, split: MicroBatches | None = None) -> Iterator[Problem]:
    """Batch sizes that are not the configuration's: as far as it says them, or with a split, exactly.

    Args:
        sections: DeepSpeed's.
        config: the run's.
        split: how a step is shared out, once the number of processes is known.
    """
    given = {key: value for key in _BATCHES if _is_a("a whole number", value := sections.get(key))}
    batch, train = config.data.batch_size, config.train
    if (said := given.get("train_batch_size", batch)) != batch:
        yield Problem(("train_batch_size",), _contradicts(said, "data.batch_size", batch))
    count = split.accumulation if split else train.accumulation
    if split is None and count is None and train.max_micro_batch is None:
        count = 1
    path: KeyPath = ("gradient_accumulation_steps",)
    if count is not None and (said := given.get("gradient_accumulation_steps", count)) != count:
        if split is not None and train.accumulation is None and train.max_micro_batch is not None:
            yield Problem(path, f"{said}, where train.max_micro_batch {train.max_micro_batch} makes {split}{_OR_AUTO}")
        else:
            yield Problem(path, _contradicts(said, "train.accumulation", count))
    if (said := given.get("train_micro_batch_size_per_gpu")) is None:
        return
    path = ("train_micro_batch_size_per_gpu",)
    hint = f"set train.max_micro_batch={said}, which chooses the accumulation"
    if split is not None and said != split.images:
        yield Problem(path, f"{said}, where data.batch_size {batch} is {split}; {hint}{_OR_AUTO}")
    elif split is None and said < 1:
        yield Problem(path, f"must be at least 1, given {said}")
    elif split is None and isinstance(train.max_micro_batch, int) and said > train.max_micro_batch:
        yield Problem(path, _contradicts(said, "train.max_micro_batch", train.max_micro_batch))
    elif split is None and batch % (said * (count or 1)):
        times = "" if count in (None, 1) else f" times train.accumulation {count}"
        yield Problem(path, f"{said}{times} does not divide data.batch_size {batch}; {hint}{_OR_AUTO}")


_OR_AUTO = ', or write "auto"'
_BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_STAGES = (0, 1, 2, 3)


def _walk(value: Any, rule: Rule, path: KeyPath, config: Config) -> Iterator[Problem]:
    if _is_left_out(value):
        return
    if not _is_a(rule.kind, value):
        yield Problem(path, f"must be {rule.kind}, given {_shown(value)}")
        return
    for key, below in value.items() if rule.keys is not None else ():
        if (inside := rule.keys.get(key)) is not None:  # type: ignore[union-attr]
            yield from _walk(below, inside, (*path, key), config)
        else:
            near = nearest(key, rule.keys)  # type: ignore[arg-type]
            hint = f"did you mean {near}?" if near else "DeepSpeed has no such setting"
            yield Problem((*path, key), f"unknown key; {hint}")
    if rule.check is not None:
        yield from rule.check(value, path, config)


def _taken(value: Any, rule: Rule) -> Any:
    if rule.keys is None or not isinstance(value, Mapping):
        return value
    known = {key: below for key, below in value.items() if key in rule.keys and not _is_left_out(below)}
    return {key: _taken(below, rule.keys[key]) for key, below in known.items() if rule.keys[key].taken}


def _is_left_out(value: Any) -> bool:
    """Whether a key is left to the configuration or to DeepSpeed's default."""
    return value is None or value == "auto"


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "true or false": lambda value: isinstance(value, bool),
    "a whole number": lambda value: _is_finite(value) and value == int(value),  # people write 5e8
    "a number": _is_finite,
    "text": lambda value: isinstance(value, str),
    "a list": lambda value: isinstance(value, list),
    "a section with keys of its own": lambda value: isinstance(value, Mapping),
    'a section such as {"stage": 2}': lambda value: isinstance(value, Mapping),
    "anything": lambda value: True,
}


def _is_a(kind: str, value: Any) -> bool:
    return _KINDS[kind](value)


def _shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _contradicts(said: Any, key: str, ours: Any) -> str:
    return f"{_shown(said)} contradicts {key} {_shown(ours)}; make them agree{_OR_AUTO}"


def _only(allowed: Any, why: str) -> Check:
    """The key may say nothing but `allowed`."""

    def check(value: Any, path: KeyPath, config: Config) -> Iterator[Problem]:
        if value != allowed:
            yield Problem(path, f"{_shown(value)}: {why}")

    return check


def _off(why: str, key: str = "enabled") -> Check:
    """A section that must not be switched on."""

    def check(section: Any, path: KeyPath, config: Config) -> Iterator[Problem]:
        if (value := section.get(key)) not in (None, "auto", False):
            yield Problem((*path, key), f"{_shown(value)}: {why}")

    return check


def _all_off(why: str) -> Check:
    """A section in which nothing may be switched on."""

    def check(section: Any, path: KeyPath, config: Config) -> Iterator[Problem]:
        for key, value in section.items():
            if value not in (None, "auto", False):
                yield Problem((*path, key), f"{_shown(value)}: {why}")

    return check


def _says(key: str, ours: Callable[[Config], Any]) -> Check:
    """The key must say what a key of the configuration says."""

    def check(value: Any, path: KeyPath, config: Config) -> Iterator[Problem]:
        if not _same(value, ours(config)):
            yield Problem(path, _contradicts(value, key, ours(config)))

    return check


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if _is_finite(one) and _is_finite(other):
        return math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def _clipping(value: Any, path: KeyPath, config: Config) -> Iterator[Problem]:
    ours = config.optimizer.clip_grad_norm
    if not _same(value, ours or 0.0):  # 0 is off
        yield Problem(path, _contradicts(value, "optimizer.clip_grad_norm", ours))


# ---- precision


def _bf16(section: Any, path: KeyPath, config: Config) -> Iterator[Problem]:
    """DeepSpeed's bf16: weights and gradients in bf16, float32 masters beside them. It goes with `train.precision`."""
    for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if section.get(key) is True:
            yield Problem((*path, key), "true: the masters must be float32, which SparseSAM puts back and saves")
    if section.get("enabled") is not True:
        return
    if config.train.precision != "bf16":
        yield Problem((*path, "enabled"), _contradicts(True, "train.precision", config.train.precision))
    elif config.train.ema_decay is not None:
        yield Problem(
            (*path, "enabled"),
            f"true: averages of bf16 weights would stand still, and train.ema_decay is {config.train.ema_decay}; with "
            "train.precision=bf16 alone the weights stay float32",
        )


def _fp16(section: Any, path: KeyPath, config: Config) -> Iterator[Problem]:
    if section.get("enabled") is True:
        yield Problem(
            (*path, "enabled"),
            "true: DeepSpeed's loss scaling is not run from a configuration; use train.precision=bf16, or fp16 with "
            "sharding.backend ddp or fsdp2",
        )


def _gradient_dtype(value: Any, path: KeyPath, config: Config) -> Iterator[Problem]:
    """What DeepSpeed can accumulate in: float32, and where the weights are bf16, that; in stage 1 one of the two."""
    sections = config.sharding.deepspeed
    bf16 = sections.get("bf16") or sections.get("bfloat16")
    bf16 = bf16 if isinstance(bf16, Mapping) and bf16.get("enabled") is True else None
    float32 = value in ("fp32", "float32", "float", "torch.float32")
    if bf16 is None and not float32:
        yield Problem(path, f"{_shown(value)}: the weights are float32, and so are their gradients")
    if bf16 is not None and float32 and config.sharding.backend == "zero1" and not bf16.get("immediate_grad_update"):
        yield Problem(path, f"{_shown(value)}: in bf16 at stage 1 it needs bf16.immediate_grad_update true")


# ---- optimizer and scheduler


def _optimizer(section: Any, path: KeyPath, config: Config) -> Iterator[Problem]:
    """It agrees if its type is the configured optimizer and each of its parameters has the configured value."""
    ours, params = config.optimizer, section.get("params")
    params = params if isinstance(params, Mapping) else {}
    name = kind = section.get("type")
    if isinstance(kind, str) and kind != "auto":
        name = kind.lower()
        if name == "adam" and params.get("adam_w_mode") is not False:
            name = "adamw"  # what DeepSpeed makes of Adam
        if ours.name.lower().removeprefix("fused") != name:
            hint = f"; DeepSpeed's {kind} is {name}" if name != kind.lower() else ""
            yield Problem((*path, "type"), f"{_contradicts(kind, 'optimizer.name', ours.name)}{hint}")
            return
    elif kind is None:
        name = ours.name.lower()
    defaults = _DEFAULTS.get(str(name), {})
    named = {"lr": ours.lr, "weight_decay": ours.weight_decay, "momentum": ours.momentum}
    for key, value in params.items():
        here = (*path, "params", key)
        if _is_left_out(value) or key in ("torch_adam", "adam_w_mode"):  # which code computes it
            continue
        if key == "max_grad_norm":
            yield Problem(here, f"{_shown(value)}: here optimizer.clip_grad_norm says it; leave it out")
        elif key in named:
            if not _same(value, named[key]):
                yield Problem(here, _contradicts(value, f"optimizer.{key}", named[key]))
        elif not _same(value, ours.kwargs.get(key, defaults.get(key))):
            known = f"which is {_shown(ours.kwargs[key])}" if key in ours.kwargs else "which is not given"
            yield Problem(here, f"{_shown(value)} belongs into optimizer.kwargs.{key}, {known}")


# What is not stated in `optimizer.kwargs`.
_ADAM = {"betas": [0.9, 0.999], "eps": 1e-8, "bias_correction": True, "amsgrad": False}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": _ADAM,
    "adamw": _ADAM,
    "lion": {"betas": [0.9, 0.99]},
    "sgd": {"dampening": 0, "nesterov": True},  # timm's sgd takes Nesterov's momentum
    "momentum": {"dampening": 0, "nesterov": False},
}


def _scheduler(section: Any, path: KeyPath, config: Config) -> Iterator[Problem]:
    """It agrees if its shape and its rates are the configured ones; what it counts in steps may be in epochs here."""
    ours, lr = config.schedule, config.optimizer.lr
    kind, params = section.get("type"), section.get("params")
    if isinstance(kind, str) and kind != "auto":
        name = {"WarmupCosineLR": "cosine", "WarmupDecayLR": "poly"}.get(kind)
        if name is None:
            shapes = "cosine, step, poly or tanh"
            yield Problem((*path, "type"), f"{_shown(kind)}: here schedule.name says it, {shapes}; leave scheduler out")
            return
        if name != ours.name:
            yield Problem((*path, "type"), f"{_contradicts(kind, 'schedule.name', ours.name)}; it is {name} here")
            return
        if name == "poly" and not _same(ours.kwargs.get("decay_rate"), 1.0):
            yield Problem((*path, "type"), f"{_shown(kind)} is linear, which is schedule.kwargs.decay_rate=1.0 here")
    expected: dict[str, tuple[str, Any]] = {
        "warmup_max_lr": ("optimizer.lr", lr),
        "warmup_min_lr": ("schedule.warmup_lr", ours.warmup_lr),
        "warmup_min_ratio": ("schedule.warmup_lr over optimizer.lr", ours.warmup_lr / lr),
        "cos_min_ratio": ("schedule.min_lr over optimizer.lr", ours.min_lr / lr),
        "warmup_type": ("every warm-up here, which is", "linear"),
        "last_batch_iteration": ("every run here, which begins at", -1),
    }
    for key, value in params.items() if isinstance(params, Mapping) else ():
        here = (*path, "params", key)
        if _is_left_out(value):
            continue
        if key in expected:
            if not _same(value, expected[key][1]):
                yield Problem(here, _contradicts(value, *expected[key]))
        elif key == "warmup_num_steps" and value == 0 and not ours.warmup_epochs:
            continue
        elif key == "total_num_steps" and config.train.max_steps is not None:
            if not _same(value, config.train.max_steps):
                yield Problem(here, _contradicts(value, "train.max_steps", config.train.max_steps))
        elif key in _COUNTED_IN_STEPS:
            said = f"here {_COUNTED_IN_STEPS[key]} says it, in epochs"
            yield Problem(here, f"{_shown(value)} counts steps; {said}{_OR_AUTO}")
        else:
            yield Problem(here, f"{_shown(value)}: no setting of schedule is that; leave it out")


_COUNTED_IN_STEPS = {"warmup_num_steps": "schedule.warmup_epochs", "total_num_steps": "train.epochs"}


# ---- ZeRO


def _stage(value: Any, path: KeyPath, config: Config) -> Iterator[Problem]:
    backend = config.sharding.backend
    if isinstance(value, bool) or value not in _STAGES or not isinstance(value, int):
        yield Problem(path, f"must be 0, 1, 2 or 3, given {_shown(value)}")
    elif backend != f"zero{value}":
        yield Problem(path, f"{value} contradicts sharding.backend {backend}; make them agree, or leave the stage out")


def _offload(section: Any, path: KeyPath, config: Config) -> Iterator[Problem]:
    if (device := section.get("device")) not in (None, "none", "auto"):
        yield Problem(
            (*path, "device"),
            f"{_shown(device)}: SparseSAM perturbs weights where the passes run; leave {path[-1]} out, and shard by "
            "stage 3 over more processes",
        )


_FLAG, _WHOLE, _NUMBER = Rule("true or false"), Rule("a whole number"), Rule("a number")
_TEXT, _ANY = Rule("text"), Rule("anything")
_SECTION = Rule("a section with keys of its own")


def _flag(allowed: bool, why: str) -> Rule:
    return Rule("true or false", False, _only(allowed, why))


def _section(check: Check, *, taken: bool = False, keys: Mapping[str, Rule] | None = None) -> Rule:
    return Rule("a section with keys of its own", taken, check, keys)


def _removed() -> Rule:
    why = "DeepSpeed has removed it, and takes no configuration that names it; leave it out"
    return Rule("anything", False, lambda value, path, config: iter([Problem(path, why)] if value else []))


_NOT_PERTURBED = "what it changes is not known to SparseSAM; leave it out"
_QUANTIZED = "SparseSAM is exact, and this rounds what is sent; leave it out"
_SAID_BY_PRECISION = "train.precision says it"

_ZERO: dict[str, Rule] = {
    "stage": Rule("anything", False, _stage),
    **dict.fromkeys(
        (
            "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions",
            "overlap_comm", "compute_grad_norm", "load_from_fp32_weights", "elastic_checkpoint",
            "gather_16bit_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save", "use_all_reduce_for_fetch_params",
            "stage3_use_all_reduce_for_fetch_params", "allgather_sequential", "stage3_allgather_sequential",
            "round_robin_gradients", "parameter_alignment", "memory_efficient_linear",
            "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
            "save_muon_momentum_buffer_in_memory", "cpu_offload_use_pin_memory",
        ),
        _FLAG,
    ),
    **dict.fromkeys(
        (
            "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "prefetch_bucket_size",
            "stage3_prefetch_bucket_size", "param_persistence_threshold", "stage3_param_persistence_threshold",
            "model_persistence_threshold", "stage3_model_persistence_threshold", "max_live_parameters",
            "stage3_max_live_parameters", "max_reuse_distance", "stage3_max_reuse_distance",
            "module_granularity_threshold", "stage3_module_granularity_threshold",
        ),
        _WHOLE,
    ),
    "leaf_module": _SECTION,
    "offload_param": _section(_offload),
    "offload_optimizer": _section(_offload),
    **dict.fromkeys(
        ("cpu_offload", "cpu_offload_param", "cpu_offload_params"),
        _flag(False, "SparseSAM perturbs weights where the passes run; leave it out"),
    ),
    "legacy_stage1": _flag(False, "DeepSpeed has removed it; leave it out"),
    "zero_hpz_partition_size": Rule("a whole number", False, _only(1, _NOT_PERTURBED)),
    "zero_quantized_weights": _flag(False, _QUANTIZED),
    "zero_quantized_gradients": _flag(False, _QUANTIZED),
    "zero_quantized_nontrainable_weights": _flag(False, _QUANTIZED),
    "ignore_unused_parameters": _flag(True, "an ascent leaves parameters out on purpose; leave it out"),
    "zenflow": Rule("anything", False, lambda value, path, config: iter([Problem(path, _NOT_PERTURBED)])),
    **dict.fromkeys(("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"), _removed()),
}  # fmt: skip

_BF16 = _section(
    _bf16,
    taken=True,
    keys=dict.fromkeys(
        (
            "enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads",
            "bf16_optimizer_states",
        ),
        _FLAG,
    ),
)  # fmt: skip

RULES: dict[str, Rule] = {
    **dict.fromkeys(_BATCHES, Rule("a whole number", False)),  # `batch_problems` looks at them together
    "gradient_clipping": Rule("a number", False, _clipping),
    "managed_gradient_accumulation": _flag(True, "each step tells DeepSpeed where its accumulation ends"),
    "gradient_allreduce_op": Rule("text", False, _only("mean", "gradients are means over the processes here")),
    "optimizer": _section(
        _optimizer, keys={"type": _TEXT, "params": _SECTION, "legacy_fusion": _FLAG, "weight_quantization": _ANY}
    ),
    "scheduler": _section(_scheduler, keys={"type": _TEXT, "params": _SECTION}),
    "zero_optimization": Rule('a section such as {"stage": 2}', True, None, _ZERO),
    "zero_allow_untested_optimizer": _flag(True, "it is always on: optimizers are timm's and torch's"),
    "zero_force_ds_cpu_optimizer": _FLAG,
    "bf16": _BF16,
    "bfloat16": _BF16,
    "fp16": _section(_fp16),
    "amp": _section(_off(_SAID_BY_PRECISION)),
    "torch_autocast": _section(_off(f"{_SAID_BY_PRECISION}, and gradients are sent in the weights' precision")),
    "data_types": Rule(
        "a section with keys of its own",
        True,
        None,
        {
            "grad_accum_dtype": Rule("text", True, _gradient_dtype),
            "param_dtype": Rule("text", False, _only("fp32", _SAID_BY_PRECISION)),
            "buffer_dtype": Rule("text"),
            "keep_in_fp32_modules": _ANY,
        },
    ),
    "activation_checkpointing": _section(
        _all_off(
            "settings of deepspeed.checkpointing, which timm's models do not call; train.activation_checkpointing=true "
            "computes blocks again instead of keeping their activations"
        )
    ),
    "wall_clock_breakdown": _flag(
        False, "DeepSpeed's timers do not know a step of two passes; the phases of each step are timed in MLflow anyway"
    ),
    "flops_profiler": _section(
        _off("it does not know a step of two passes; ssam-scale cost and ssam-scale bench steps do")
    ),
    "compile": _section(_off(_NOT_PERTURBED, "deepcompile")),
    "tensor_parallel": _section(_off("SparseSAM shards by ZeRO only; leave it out", "autotp_size")),
    "expert_parallel": _section(_off("SparseSAM shards by ZeRO only; leave it out")),
    "hybrid_engine": _section(_off("it is for generation; leave it out")),
    "data_efficiency": _section(_off("images are loaded by FFCV here: see data; leave it out")),
    "autotuning": _section(_off("DeepSpeed's launcher tunes only scripts whose batch sizes DeepSpeed decides")),
    "sequence_parallel_size": Rule("a whole number", False, _only(1, "SparseSAM shards by ZeRO only; leave it out")),
    "weight_quantization": _section(_all_off("it is for inference; leave it out")),
    **dict.fromkeys(
        (
            "elasticity", "nebula", "compression_training", "quantize_training", "sparse_gradients", "eigenvalue",
            "sparse_attention", "graph_harvesting", "curriculum_learning", "progressive_layer_drop",
        ),
        _removed(),
    ),
    **dict.fromkeys(("steps_per_print", "gradient_predivide_factor", "vocabulary_size"), _NUMBER),
    **dict.fromkeys(
        (
            "prescale_gradients", "disable_allgather", "dump_state", "disable_python_gc", "memory_breakdown",
            "dataloader_drop_last", "use_data_before_expert_parallelism",
        ),
        _FLAG,
    ),
    **dict.fromkeys(("communication_data_type", "seq_parallel_communication_data_type", "log_level"), _TEXT),
    **dict.fromkeys(
        (
            "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "timers", "checkpoint", "datastates_ckpt",
            "aio", "pipeline",
        ),
        _SECTION,
    ),
}  # fmt: skip
_ALL = Rule("a section with keys of its own", keys=RULES)
