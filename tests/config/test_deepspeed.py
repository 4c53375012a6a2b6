"""Each key of a DeepSpeed configuration is taken, agrees with the run's, or is a line that says where it belongs."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssam_scale.config.deepspeed import RULES, taken
from ssam_scale.config.deepspeed_file import read_deepspeed
from ssam_scale.config.load import dump, load
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from tests.support.configs import SMALL

ADAMW = SMALL.replace("  lr: 0.1\n", "  name: adamw\n  lr: 0.1\n")
BACKEND = "sharding: {backend: zero2}\n"
Read = Callable[..., Config]


@pytest.fixture
def beside(tmp_path: Path) -> Read:
    """Load a configuration with a file of DeepSpeed's beside it, given as text or as what is to be in it."""

    def beside(deepspeed: Any, *overrides: str, text: str = ADAMW) -> Config:
        (tmp_path / "given.yaml").write_text(text)
        written = deepspeed if isinstance(deepspeed, str) else json.dumps(deepspeed)
        (tmp_path / "ds.json").write_text(written)
        try:
            return load(tmp_path / "given.yaml", list(overrides), str(tmp_path / "ds.json"))
        except UserError as error:
            raise UserError(str(error).replace(f"{tmp_path}/", "")) from None

    return beside


def said(read: Read, *given: Any, **more: Any) -> list[str]:
    """The lines of what is wrong."""
    with pytest.raises(UserError) as caught:
        read(*given, **more)
    first, *lines = str(caught.value).split("\n  ")
    return lines or [first]


# As Hugging Face's documentation has it for the Trainer.
HUGGING_FACE: dict[str, Any] = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "offload_param": {"device": "none", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def test_a_file_for_hugging_faces_trainer(beside: Read) -> None:
    config = beside(HUGGING_FACE)
    assert config.sharding.backend == "zero3"
    assert taken(config.sharding.deepspeed) == {
        "bf16": {},
        "zero_optimization": {
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "steps_per_print": 2000,
    }


def test_it_is_printed_and_read_again(beside: Read, tmp_path: Path) -> None:
    config = beside(HUGGING_FACE)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml") == config


AGREES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "batch sizes": ({"train_batch_size": 128, "gradient_accumulation_steps": 1}, []),
    "a micro-batch that divides": ({"train_micro_batch_size_per_gpu": 32}, []),
    "accumulation": ({"gradient_accumulation_steps": 4}, ["train.accumulation=4"]),
    "accumulation that depends on the processes": (
        {"gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": 16},
        ["train.max_micro_batch=16"],
    ),
    "no clipping": ({"gradient_clipping": 0.0}, []),
    "clipping": ({"gradient_clipping": 1}, ["optimizer.clip_grad_norm=1.0"]),
    "AdamW as it is": ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999], "eps": 1e-8}}}, []),
    "AdamW as configured": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 0.001, "weight_decay": 0.3, "betas": [0.9, 0.95]}}},
        ["optimizer.lr=1.0e-3", "optimizer.weight_decay=0.3", "optimizer.kwargs.betas=[0.9,0.95]"],
    ),
    "DeepSpeed's Adam, which is AdamW": ({"optimizer": {"type": "Adam", "params": {"torch_adam": True}}}, []),
    "Adam": ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, ["optimizer.name=adam"]),
    "SGD": ({"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}, ["optimizer.name=sgd"]),
    "a cosine": (
        {
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {"warmup_type": "linear", "cos_min_ratio": 0.01, "warmup_num_steps": 0},
            }
        },
        ["schedule.min_lr=1.0e-3"],
    ),
    "a linear decay": (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 0.1, "warmup_min_lr": 0.0}}},
        ["schedule.name=poly", "schedule.kwargs.decay_rate=1.0"],
    ),
    "as many steps": (
        {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 500, "warmup_num_steps": 0}}},
        ["train.epochs=null", "train.max_steps=500"],
    ),
    "bf16": ({"bf16": {"enabled": True}}, ["train.precision=bf16"]),
    "weights that stay float32": ({"bf16": {"enabled": False}}, ["train.precision=bf16"]),
    "its old name": ({"bfloat16": {"enabled": True}}, ["train.precision=bf16"]),
    "what is off": (
        {
            "fp16": {"enabled": False},
            "amp": {"enabled": False, "opt_level": "O1"},
            "torch_autocast": {"enabled": False},
            "flops_profiler": {"enabled": False, "profile_step": 1},
            "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
            "wall_clock_breakdown": False,
            "sparse_gradients": False,
            "data_efficiency": {"enabled": False},
            "autotuning": {"enabled": False},
        },
        [],
    ),
    "the stage, said twice": ({"zero_optimization": {"stage": 2}}, ["sharding.backend=zero2"]),
    "what is always so": (
        {"zero_allow_untested_optimizer": True, "managed_gradient_accumulation": True, "gradient_allreduce_op": "mean"},
        [],
    ),
    "nothing, as null": ({"train_batch_size": None, "optimizer": None, "communication_data_type": None}, []),
}


@pytest.mark.parametrize(("sections", "overrides"), AGREES.values(), ids=AGREES)
def test_what_agrees(sections: dict[str, Any], overrides: list[str], beside: Read) -> None:
    sections = {"zero_optimization": {"stage": 1}} | sections
    config = beside(sections, *overrides)
    assert config.sharding.deepspeed == sections
    kept = {"bf16", "bfloat16", "zero_optimization"}
    assert taken(config.sharding.deepspeed).keys() <= kept


BELONGS_ELSEWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "batch": (
        {"train_batch_size": 4096},
        "ds.json:1, given.yaml:7: train_batch_size: 4096 contradicts data.batch_size 128; make them agree, or write "
        '"auto"',
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 4},
        'gradient_accumulation_steps: 4 contradicts train.accumulation 1; make them agree, or write "auto"',
    ),
    "micro-batch": (
        {"train_micro_batch_size_per_gpu": 48},
        "train_micro_batch_size_per_gpu: 48 does not divide data.batch_size 128; set train.max_micro_batch=48, which "
        'chooses the accumulation, or write "auto"',
    ),
    "no micro-batch": ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu: must be at least 1"),
    "clipping": ({"gradient_clipping": 1.0}, "gradient_clipping: 1.0 contradicts optimizer.clip_grad_norm null"),
    "optimizer": (
        {"optimizer": {"type": "Lamb"}},
        'ds.json:1, given.yaml:10: optimizer.type: "Lamb" contradicts optimizer.name "adamw"',
    ),
    "Adam that is AdamW": (
        {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
        'optimizer.type: "Adam" contradicts optimizer.name "adamw"',
    ),
    "rate": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
        "ds.json:1, given.yaml:11: optimizer.params.lr: 0.001 contradicts optimizer.lr 0.1",
    ),
    "betas": (
        {"optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.999]}}},
        "optimizer.params.betas: [0.8, 0.999] belongs into optimizer.kwargs.betas, which is not given",
    ),
    "a norm in the optimizer": (
        {"optimizer": {"params": {"max_grad_norm": 1.0}}},
        "optimizer.params.max_grad_norm: 1.0: here optimizer.clip_grad_norm says it; leave it out",
    ),
    "scheduler": (
        {"scheduler": {"type": "OneCycle"}},
        'scheduler.type: "OneCycle": here schedule.name says it, cosine, step, poly or tanh; leave scheduler out',
    ),
    "another scheduler": (
        {"scheduler": {"type": "WarmupDecayLR"}},
        'scheduler.type: "WarmupDecayLR" contradicts schedule.name "cosine"; make them agree, or write "auto"; it is '
        "poly here",
    ),
    "steps": (
        {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 500}}},
        "scheduler.params.warmup_num_steps: 500 counts steps; here schedule.warmup_epochs says it, in epochs, or write "
        '"auto"',
    ),
    "a curved warm-up": (
        {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_type": "log"}}},
        'scheduler.params.warmup_type: "log" contradicts every warm-up here, which is "linear"',
    ),
    "bf16": ({"bf16": {"enabled": True}}, 'bf16.enabled: true contradicts train.precision "fp32"'),
    "fp16": ({"fp16": {"enabled": True}}, "fp16.enabled: true: DeepSpeed's loss scaling is not run"),
    "autocast": ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled: true: train.precision says it"),
    "checkpointing": (
        {"activation_checkpointing": {"partition_activations": True}},
        "activation_checkpointing.partition_activations: true: settings of deepspeed.checkpointing, which timm's",
    ),
    "timers": ({"wall_clock_breakdown": True}, "wall_clock_breakdown: true: DeepSpeed's timers do not know a step of"),
    "flops": ({"flops_profiler": {"enabled": True}}, "flops_profiler.enabled: true: it does not know a step of two"),
    "offload": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}},
        'zero_optimization.offload_optimizer.device: "cpu": SparseSAM perturbs weights where the passes run',
    ),
    "old offload": (
        {"zero_optimization": {"stage": 2, "cpu_offload": True}},
        "zero_optimization.cpu_offload: true: Sp",
    ),
    "quantized": (
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        "zero_optimization.zero_quantized_weights: true: SparseSAM is exact, and this rounds what is sent",
    ),
    "untested": ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer: false: it is always on"),
    "removed": ({"elasticity": {"enabled": True}}, "elasticity: DeepSpeed has removed it"),
    "gradients": (
        {"data_types": {"grad_accum_dtype": "bf16"}},
        'data_types.grad_accum_dtype: "bf16": the weights are float32, and so are their gradients',
    ),
    # mistakes
    "unknown": ({"gradient_cliping": 1.0}, "gradient_cliping: unknown key; did you mean gradient_clipping?"),
    "unknown in ZeRO": (
        {"zero_optimization": {"stage": 2, "overlap_com": True}},
        "zero_optimization.overlap_com: unknown key; did you mean overlap_comm?",
    ),
    "nothing near": ({"zzz": 1}, "zzz: unknown key; DeepSpeed has no such setting"),
    "stage 4": ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: must be 0, 1, 2 or 3, given 4"),
    "a stage as text": ({"zero_optimization": {"stage": "2"}}, 'stage: must be 0, 1, 2 or 3, given "2"'),
    "a stage as a flag": ({"zero_optimization": {"stage": True}}, "stage: must be 0, 1, 2 or 3, given true"),
    "no section": (
        {"zero_optimization": True},
        'zero_optimization: must be a section such as {"stage": 2}, given true',
    ),
    "a number as text": (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}},
        'zero_optimization.reduce_bucket_size: must be a whole number, given "5e8"',
    ),
    "a flag as a number": ({"memory_breakdown": 1}, "memory_breakdown: must be true or false, given 1"),
    "half an image": ({"train_batch_size": 128.5}, "train_batch_size: must be a whole number, given 128.5"),
    "no stage": (
        {"zero_optimization": {"overlap_comm": True}},
        "ds.json: sharding.deepspeed: is for the backends zero0 to zero3, and backend is auto; say "
        "zero_optimization.stage, or sharding.backend=zero2",
    ),
    "the configuration's stage": (
        {"zero_optimization": {"stage": "auto"}},
        "backend is auto; say zero_optimization.st",
    ),
    "too large": ({"zero_optimization": {"stage": 2}, "steps_per_print": 1e999}, "steps_per_print: must be a number"),
}


@pytest.mark.parametrize(("sections", "message"), BELONGS_ELSEWHERE.values(), ids=BELONGS_ELSEWHERE)
def test_what_belongs_elsewhere(sections: dict[str, Any], message: str, beside: Read) -> None:
    sections = {"zero_optimization": {"stage": 1}} | sections
    [line] = said(beside, json.dumps(sections).replace("Infinity", "1e999"))
    assert line.startswith("ds.json")
    assert message in line


def test_contradictions_of_the_stage(beside: Read) -> None:
    [line] = said(beside, {"zero_optimization": {"stage": 3}}, text=ADAMW + BACKEND)
    assert line == (
        "ds.json:1, given.yaml:19: zero_optimization.stage: 3 contradicts sharding.backend zero2; make them agree, or "
        "leave the stage out"
    )
    [line] = said(beside, {"zero_optimization": {"stage": 3}}, "sharding.backend=ddp")
    assert "is for the backends zero0 to zero3, and backend is ddp" in line
    assert beside({"zero_optimization": {"stage": 3}}, "sharding.backend=zero3", text=ADAMW + BACKEND)
    assert beside({"zero_optimization": {}}, text=ADAMW + BACKEND).sharding.backend == "zero2"
    [line] = said(beside, {})
    assert line.endswith("it has no stage of ZeRO; say zero_optimization.stage there, or sharding.backend=zero2")


def test_rules_of_the_configuration_see_the_stage(beside: Read) -> None:
    [line] = said(beside, {"zero_optimization": {"stage": 2}}, "train.precision=fp16")
    assert line.startswith("override train.precision=fp16, ds.json:1: train.precision fp16 needs loss scaling, which ")


def test_bf16_weights_and_averages(beside: Read) -> None:
    sections = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
    lines = said(beside, sections, "train.precision=bf16", "train.ema_decay=0.9")
    assert ["masters must be float32" in lines[0], "averages of bf16 weights would stand still" in lines[1]] == [
        True
    ] * 2
    sections = {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    [line] = said(beside, sections, "train.precision=bf16")
    assert "in bf16 at stage 1 it needs bf16.immediate_grad_update true" in line


def test_all_of_a_file_at_once(beside: Read) -> None:
    lines = said(
        beside, {"train_batch_size": 1, "zzz": 1, "zero_optimization": {"stage": 2, "yyy": 1}, "gradient_clipping": 9}
    )
    assert [line.split(": ")[1] for line in lines] == [
        "train_batch_size",
        "zzz",
        "zero_optimization.yyy",
        "gradient_clipping",
    ]


def test_in_the_configurations_own_file(read: Read, complaint: Any) -> None:
    section = "sharding:\n  deepspeed:\n    zero_optimization:\n      stage: 2\n    train_batch_size: 64\n"
    assert complaint(SMALL + section) == (
        "given.yaml:22, given.yaml:7: sharding.deepspeed.train_batch_size: 64 contradicts data.batch_size 128; make "
        'them agree, or write "auto"'
    )
    assert read(SMALL + section, ["data.batch_size=64"]).sharding.backend == "zero2"
    override = "sharding.deepspeed.steps_per_print=on"
    assert complaint(SMALL + section, ["data.batch_size=64", override]) == (
        f'override {override}: {override.partition("=")[0]}: must be a number, given "on"'
    )
    assert complaint(SMALL, ["sharding.deepspeed.zero_optimization=3"]).endswith(
        'zero_optimization: must be a section such as {"stage": 2}, given 3'
    )


def test_a_file_and_the_configurations_own_section(beside: Read) -> None:
    own = "sharding: {deepspeed: {steps_per_print: 7, memory_breakdown: true}}\n"
    config = beside({"zero_optimization": {"stage": 0}, "steps_per_print": 9}, text=ADAMW + own)
    assert taken(config.sharding.deepspeed) == {"steps_per_print": 9, "memory_breakdown": True, "zero_optimization": {}}
    config = beside({"zero_optimization": {"stage": 0}, "steps_per_print": 9}, "sharding.deepspeed.steps_per_print=1")
    assert taken(config.sharding.deepspeed)["steps_per_print"] == 1


# ---- the file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ds.json:1:1: not JSON: Expecting value"),
        ('{"a": }', "ds.json:1:7: not JSON: Expecting value"),
        ('{"a": 1', "ds.json:1:8: not JSON: Expecting ',' delimiter"),
        ('{\n\t"a": 1,\n\t"a": 2}', "ds.json:3: a: given twice, first in line 2"),
        (
            '{"zero_optimization": {"stage": 1, "stage": 2}}',
            "ds.json:1: zero_optimization.stage: given twice, first in",
        ),
        ("[1]", "ds.json: a configuration of DeepSpeed's is an object with keys, this is [1]"),
        ("3", "ds.json: a configuration of DeepSpeed's is an object with keys, this is 3"),
        ('{"a":\n NaN}', "ds.json:2: NaN is not a number that JSON knows"),
        ('{"a": -Infinity}', "ds.json:1: -Infinity is not a number that JSON knows"),
        ("[" * 100_000, "ds.json: not a configuration: it is nested too deeply"),
        ("zero: 2", "ds.json:1:1: not JSON: Expecting value"),
    ],
)
def test_files_that_are_none(text: str, message: str, beside: Read) -> None:
    assert said(beside, text)[0].startswith(message)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "given.yaml").write_text(SMALL)
    (tmp_path / "bytes.json").write_bytes(b'{"a": "\xff\xfe"}')
    for name, message in {
        f"{tmp_path}/no.json": f"--deepspeed_config {tmp_path}/no.json: no such file",
        str(tmp_path): f"--deepspeed_config {tmp_path}: cannot be read: Is a directory",
        f"{tmp_path}/bytes.json": f"{tmp_path}/bytes.json: not a text file (byte 7 is not UTF-8)",
        base64.urlsafe_b64encode(b"[1]").decode(): "--deepspeed_config WzFd: no such file",
    }.items():
        with pytest.raises(UserError) as caught:
            load(tmp_path / "given.yaml", (), name)
        assert str(caught.value) == message


def test_comments_byte_order_marks_tabs_and_base64(beside: Read, tmp_path: Path) -> None:
    text = (
        '\ufeff{ // a comment\n\t/* and\n two lines */ "steps_per_print": 9, # "a": 1\n'
        '"csv_monitor": {"output_path": "http://a#b /* c */"},\r\n\t"zero_optimization":{"stage":2,"x":1}}'
    )
    [line] = said(beside, text)
    assert line.startswith("ds.json:5: zero_optimization.x: unknown key")
    config = beside(text.replace(',"x":1', ""))
    assert config.sharding.backend == "zero2"
    assert config.sharding.deepspeed["csv_monitor"] == {"output_path": "http://a#b /* c */"}
    encoded = base64.urlsafe_b64encode(json.dumps({"zero_optimization": {"stage": 3}}).encode()).decode()
    assert load(tmp_path / "given.yaml", (), encoded).sharding.backend == "zero3"


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(st.dictionaries(st.text(), ANY_JSON, max_size=4), st.sampled_from([None, 2, "\t"]), st.booleans())
def test_any_json_is_read_as_it_is(tmp_path: Path, values: dict[str, Any], indent: Any, ascii_only: bool) -> None:
    path = tmp_path / "any.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    if ascii_only or text.isprintable():
        assert read_deepspeed(str(path))[0] == values
    else:  # the lines are YAML's, which knows fewer characters
        with suppress(UserError):
            assert read_deepspeed(str(path))[0] == values


# ---- held to DeepSpeed itself


def test_every_key_that_deepspeed_looks_at_has_a_rule() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    asked: set[str] = set()

    class Asked(dict[str, Any]):
        """Remembers what it is asked for."""

        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

        def __getitem__(self, key: str) -> Any:
            asked.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

        def keys(self) -> Any:
            return self

    DeepSpeedConfig(Asked(train_micro_batch_size_per_gpu=1))
    assert len(asked) > 50
    assert asked <= RULES.keys()
    fields = DeepSpeedZeroConfig.model_fields
    zero = RULES["zero_optimization"].keys
    assert zero is not None
    assert {*fields, *(field.alias for field in fields.values() if field.alias)} <= zero.keys()


def test_deepspeed_takes_what_is_taken(beside: Read) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    values = {"true or false": False, "a whole number": 1e6, "a number": 2, "text": "fp32"}
    sections = {key: values[rule.kind] for key, rule in RULES.items() if rule.taken and rule.kind in values}
    zero = RULES["zero_optimization"].keys
    assert zero is not None
    # Of two names of one thing DeepSpeed takes either, but not both.
    twice = {name for name in zero if f"stage3_{name}" in zero} | {"stage3_gather_fp16_weights_on_model_save"}
    chosen = {name: rule for name, rule in zero.items() if name not in twice and rule.taken and rule.kind in values}
    sections["zero_optimization"] = {"stage": 1, **{name: values[rule.kind] for name, rule in chosen.items()}}
    sections |= {key: {} for key in ("comms_logger", "tensorboard", "csv_monitor", "timers", "checkpoint", "aio")}
    sections["log_level"] = "info"
    left = taken(beside(sections).sharding.deepspeed)
    assert left.keys() == sections.keys()
    DeepSpeedConfig({**left, "zero_optimization": {**left["zero_optimization"], "stage": 1}, **BATCH})


BATCH = {"train_micro_batch_size_per_gpu": 1}
