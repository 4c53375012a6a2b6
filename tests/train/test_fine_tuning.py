"""Training a part of a network: what is frozen, for how long, and groups of parameters with options of their own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from torch import nn

from ssam_scale import SparseSAM
from ssam_scale.config.load import load
from ssam_scale.config.parameter_sections import Freeze
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.models import freeze, train_mode
from ssam_scale.perturbation.schedules.radius.lr import LRRadius
from ssam_scale.tracking.store import open_store
from ssam_scale.train.learning_rate import learning_rate, scheduler
from ssam_scale.train.length import Length
from ssam_scale.train.optimizer import base_optimizer, check_groups
from tests.support.checkout import ROOT
from tests.support.runs import RESNET, VIT, differing, ssam_scale, tensors_of, train_on_ranks, write_config
from tests.support.tiers import few

CONFIGS = ROOT / "configs"
FIRST_BLOCKS = {"parameters": r"^(patch_embed|pos_embed|cls_token|blocks\.[01]\.)"}
BIASES = r"^(blocks.*(qkv|proj|fc\d)|patch_embed.*)\.bias$"
HEAD = r"^head\."
BACKBONE = r"^(?!head\.)"


def network(section: dict[str, Any] = VIT) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(section["name"], num_classes=section["num_classes"], **section["kwargs"])
    return model


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Makes a configuration with other sections; no data is needed for what is built here."""

    def make(**sections: Any) -> Config:
        path = write_config(tmp_path / "run.yaml", tmp_path, store=False, **{"model": VIT, **sections})
        return load(path, [])

    return make


def frozen(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def test_what_is_frozen_in_an_epoch() -> None:
    model = network()
    of_blocks = {name for name, _ in model.named_parameters() if name.startswith(("blocks.0.", "blocks.1."))}
    of_head = {"head.weight", "head.bias"}
    sections = [Freeze(parameters=r"^blocks\.[01]\.", until_epoch=3), Freeze(parameters=HEAD, until_epoch=1)]
    for epoch, expected in ((0, of_blocks | of_head), (1, of_blocks), (2, of_blocks), (3, set())):
        freeze(model, sections, epoch)
        assert frozen(model) == expected, epoch
    freeze(model, [Freeze(parameters=HEAD, until_epoch=None)], 10**6)
    assert frozen(model) == of_head


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            [{"parameters": "blcks"}],
            "freeze.0.parameters 'blcks' matches none of the 56 parameters: cls_token, ",
        ),
        ([{"parameters": HEAD}, {"parameters": BACKBONE}], "model.freeze leaves nothing to train in epoch 0"),
    ],
    ids=["a name that is wrong", "all"],
)
def test_freezing_that_cannot_be_meant(sections: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        freeze(network(), [Freeze(**section) for section in sections], 0)


def test_frozen_batchnorm_keeps_its_statistics_and_others_do_not() -> None:
    model = network(RESNET)
    freeze(model, [Freeze(parameters=r"^(conv1|bn1|layer1)\b", until_epoch=None)], 0)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("running_mean")}
    train_mode(model)
    model(torch.randn(4, 3, 32, 32))
    changed = {
        name for name, buffer in model.named_buffers() if name in before and not torch.equal(before[name], buffer)
    }
    assert changed == {name for name in before if not name.startswith(("bn1", "layer1"))}


@pytest.mark.parametrize("layer_decay", [None, 0.5], ids=["alike", "by layers"])
@pytest.mark.parametrize("decay_all", [False, True], ids=["weights decay", "all decay"])
def test_groups_are_timms_but_for_what_is_named(config: Any, layer_decay: float | None, decay_all: bool) -> None:
    made = config(
        optimizer={
            "name": "adamw",
            "lr": 0.1,
            "weight_decay": 0.3,
            "decay_norm_and_bias": decay_all,
            "layer_decay": layer_decay,
            "groups": [
                {"parameters": HEAD, "lr_scale": 10.0, "weight_decay": 0.0},
                {"parameters": BIASES, "rho": 0.0},
                {"parameters": "norm", "rho": 0.7, "lr_scale": 0.5},
            ],
        },
        perturbation={"rho": 0.2},
    )
    model = network()
    theirs = create_optimizer_v2(
        model, "adamw", lr=0.1, weight_decay=0.3, layer_decay=layer_decay, filter_bias_and_bn=not decay_all
    )
    ours = base_optimizer(made, model)

    def options(optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float, float | None]]:
        names = {id(p): name for name, p in model.named_parameters()}
        return {
            names[id(p)]: (group.get("lr_scale", 1.0), group["weight_decay"], group.get("rho"))
            for group in optimizer.param_groups
            for p in group["params"]
        }

    found = options(ours)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, (scale, decay, _) in options(theirs).items():
        if name.startswith("head."):
            assert found[name] == (10.0 * scale, 0.0, None)
        elif re.search(BIASES, name):
            assert found[name] == (scale, decay, 0.0)
        elif "norm" in name:
            assert found[name] == (0.5 * scale, decay, 0.7)
        else:
            assert found[name] == (scale, decay, None)
    if layer_decay is not None:
        scales = {name: scale for name, (scale, _, _) in found.items()}
        assert scales["blocks.3.attn.qkv.weight"] == 2 * scales["blocks.2.attn.qkv.weight"]
    # Without a perturbation there is no radius to have.
    assert all(
        "rho" not in group
        for group in base_optimizer(made.model_copy(update={"perturbation": None}), model).param_groups
    )


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([{"parameters": "haed"}], "optimizer.groups.0.parameters 'haed' matches none of the 56 parameters: cls_token"),
        (
            [{"parameters": "norm"}, {"parameters": r"\.bias$"}],
            r"optimizer.groups.1.parameters '\\\\.bias\$' matches blocks.0.norm1.bias and 8 more, which "
            r"optimizer.groups.0.parameters 'norm' has; a parameter is of one group",
        ),
        (
            [{"parameters": "head"}, {"parameters": "patch"}, {"parameters": r"^head\.weight$"}],
            r"optimizer.groups.2.parameters .* matches head.weight, which optimizer.groups.0.parameters 'head' has",
        ),
    ],
    ids=["a name that is wrong", "groups that overlap", "one of another"],
)
def test_groups_that_cannot_be_meant(config: Any, groups: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_groups(config(optimizer={"lr": 0.1, "groups": groups}), network())


def test_the_rate_and_the_radius_of_the_schedule_are_without_the_scale_of_a_group(config: Any) -> None:
    made = config(
        optimizer={"lr": 0.4, "layer_decay": 0.5, "groups": [{"parameters": HEAD, "lr_scale": 3.0}]},
        perturbation={"rho": 0.2, "rho_schedule": "lr"},
        train={"epochs": 10},
    )
    model = network()
    opt = SparseSAM(model, base_optimizer(made, model), rho=0.2, schedule=LRRadius())
    rates = scheduler(made, opt.base_optimizer, Length.of_epochs(10, 1, 1))
    assert {group["lr_scale"] for group in opt.param_groups} > {0.25, 0.5, 3.0}
    for step in range(10):
        rates.step_update(step)
        now = learning_rate(opt.base_optimizer)
        assert {round(group["lr"] / group["lr_scale"], 12) for group in opt.param_groups} == {round(now, 12)}
        torch.testing.assert_close(opt.radii, [0.2 * now / 0.4] * len(opt.radii))


def test_keys_that_do_not_go_together(config: Any) -> None:
    """As users read them; `load` raises them all."""
    probed: dict[str, Any] = {**VIT, "freeze": [{**FIRST_BLOCKS, "until_epoch": 2}]}
    with pytest.raises(UserError, match=r"model.freeze.0.until_epoch 2 must be less than train.epochs 2"):
        config(model=probed)
    mask = {"pattern": "element", "score": "weight"}
    with pytest.raises(UserError, match=r"pattern element is chosen among what is trained.*use depth, norm or named"):
        config(model=probed, train={"epochs": 4}, perturbation={"rho": 0.1, "mask": mask})
    with pytest.raises(UserError, match=r'model.freeze.0.parameters: "\(" is not a regular expression'):
        config(model={**VIT, "freeze": [{"parameters": "("}]})
    with pytest.raises(UserError, match=r"optimizer.groups.0.lr_scal.*did you mean"):
        config(optimizer={"lr": 0.1, "groups": [{"parameters": HEAD, "lr_scal": 2.0}]})
    with pytest.raises(UserError, match=r"it is optimizer\.layer_decay"):
        config(optimizer={"lr": 0.1, "kwargs": {"layer_decay": 0.5}})


# A head that is trained alone, then all, with a learning rate that falls towards the first layers.
PROBE_THEN_ALL: dict[str, Any] = {
    "model": {**VIT, "freeze": [{"parameters": BACKBONE, "until_epoch": 1}]},
    "optimizer": {
        "name": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.05,
        "layer_decay": 0.75,
        "groups": [{"parameters": HEAD, "lr_scale": 4.0}, {"parameters": r"^norm\.", "rho": 0.0}],
    },
    "perturbation": {"rho": 0.05, "mask": {"pattern": "depth", "policy": "rotate", "cut": [0.0, 1.0]}},
    "train": {"epochs": 3, "ema_decay": 0.9},
    "checkpoint": {"keep": 10, "every_epochs": 2, "every_minutes": None},
}


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process that was not interrupted."""
    home = tmp_path_factory.mktemp("alone")
    assert ssam_scale("train", "--config", write_config(home / "run.yaml", data, **PROBE_THEN_ALL)) == 0
    return home


@pytest.mark.slow
def test_a_head_is_trained_alone_and_then_all_in_one_run(alone: Path, data: Path, tmp_path: Path) -> None:
    at_first, later = (load_file(alone / f"checkpoints/epoch_000{n}/model.safetensors") for n in (1, 3))
    torch.manual_seed(0)
    begun = write_config(tmp_path / "run.yaml", data, **{**PROBE_THEN_ALL, "optimizer": {"name": "sgd", "lr": 1e-12}})
    assert ssam_scale("train", "--config", begun, "model.freeze=[]", "train.epochs=1", "perturbation=null") == 0
    initial = load_file(tmp_path / "checkpoints/epoch_0001/model.safetensors")
    for name, tensor in at_first.items():
        if name.startswith("head."):
            assert not torch.allclose(tensor, initial[name], atol=1e-4), name
        else:
            torch.testing.assert_close(tensor, initial[name], rtol=0, atol=1e-9)
            assert not torch.equal(later[name], tensor), name
    # The checkpoint between is there although epochs are saved in twos, and the run is one.
    assert sorted(path.name for path in (alone / "checkpoints").glob("epoch_*")) == [f"epoch_000{n}" for n in (1, 2, 3)]
    client = open_store(f"sqlite:///{alone}/mlflow.db", create=False)
    [run] = client.search_runs([client.get_experiment_by_name("ssam_scale").experiment_id])
    assert run.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == sorted(set(steps))
    assert len(client.get_metric_history(run.info.run_id, "val/top1")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("place", ["epoch_0001", "epoch_0002"])
def test_it_goes_on_from_where_more_is_trained_and_from_behind_it(
    place: str, alone: Path, data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", data, **PROBE_THEN_ALL)
    assert ssam_scale("train", "--config", config, f"checkpoint.resume={alone}/checkpoints/{place}") == 0
    assert differing(alone / "checkpoints/epoch_0003", tmp_path / "checkpoints/epoch_0003") == []


@pytest.mark.slow
def test_the_configuration_fine_tunes_a_folder_from_weights_of_ones_own(
    alone: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {**VIT, "num_classes": 5, "drop_path_rate": 0.1, "pretrained": str(alone / "checkpoints/epoch_0003")}
    smaller = {
        "model": model,
        "data.train": f"folder:{data}/train",
        "data.val": f"folder:{data}/val",
        "data.batch_size": 12,
        "data.resolution": 32,
        "data.eval_resolution": 32,
        "schedule.warmup_epochs": 0,
        "train.epochs": 1,
        "train.precision": "fp32",  # CPUs without bf16 instructions emulate it, slowly
        "checkpoint.directory": str(tmp_path / "checkpoints"),
        "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
        "tracking.log_model": False,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in smaller.items()]
    assert ssam_scale("train", "--config", CONFIGS / "finetune_vit.yaml", *overrides) == 0
    said = capsys.readouterr()
    assert re.search(r"model.pretrained: 54 tensors from .*; new: head.weight, head.bias", said.out + said.err)
    state = json.loads((tmp_path / "checkpoints/epoch_0001/state.json").read_text())
    assert state["config"]["perturbation"]["mask"]["cut"] == [0.5, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "lion", "lamb"])
def test_what_is_unfrozen_begins_as_in_a_run_that_begins(name: str, data: Path, tmp_path: Path) -> None:
    """With blocks of a stage in one group with others that have a state; fused kernels want all of them to have one."""
    frozen = [{"parameters": r"^blocks\.1\.", "until_epoch": 1}, {"parameters": "^patch_embed"}]
    config = write_config(
        tmp_path / "run.yaml",
        data,
        model={**VIT, "freeze": frozen, "stages": [f"blocks.{i}" for i in range(4)]},
        optimizer={"name": name, "lr": 1e-3},
        perturbation={"rho": 0.05, "mask": {"pattern": "depth", "policy": "rotate"}},
    )
    assert ssam_scale("train", "--config", config) == 0
    before, after = (load_file(tmp_path / f"checkpoints/epoch_000{n}/model.safetensors") for n in (1, 2))
    assert torch.equal(before["patch_embed.proj.weight"], after["patch_embed.proj.weight"])
    for name in before:
        if name.startswith("blocks."):
            assert not torch.equal(before[name], after[name]), name
    assert all(tensor.isfinite().all() for tensor in after.values())


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(["ddp", "fsdp2", "zero1", "zero2", "zero3"], "zero2"))
def test_two_processes_train_the_same(backend: str, alone: Path, data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, **PROBE_THEN_ALL)
    output = train_on_ranks(2, config, f"sharding.backend={backend}")
    assert output.count("weights are not trained before epoch 2") == 1
    one, two = (tensors_of(home / "checkpoints/epoch_0003") for home in (alone, tmp_path))
    for name, tensor in one.items():
        if name.startswith(("model:", "ema:")):
            # fp32; AdamW divides by the root of what is nearly 0 in its first steps.
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-5)
    assert json.loads((tmp_path / "checkpoints/epoch_0001/state.json").read_text())["parts"]["progress"]["epoch"] == 1
