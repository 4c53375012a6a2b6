"""Whatever a configuration holds survives being written and read, and means the same as overrides."""

from __future__ import annotations

import itertools
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from ssam_scale.config.explain import dotted_names
from ssam_scale.config.load import dump, load
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from tests.support.configs import SMALL

relaxed = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None, max_examples=50
)

# Anything that can stand in a text file, with the words that YAML makes something else of more often than by chance.
WORDS = (
    "on|off|yes|No|true|null|~|| |1e-3|1_000|0x1f|1:30|2026-01-01|.inf|=|<<|- a|a: b|a #b|#|'|\"|a\nb|a\n\n b |\t|{}"
    "|[|*a|&a|!x|%|@|é|\x85|\u2028|\ufeff"
)
TEXTS = st.sampled_from(WORDS.split("|")) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="$\0"),
    max_size=20,  # of a path, a variable's name
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


def values(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Values that a field of this type and these bounds may have."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        extra = [x for a in arguments[1:] for x in getattr(a, "metadata", [a])]
        return values(arguments[0], metadata + extra)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(argument, metadata) for argument in arguments])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0], []), min_size=1, max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*[values(argument, []) for argument in arguments])
    if origin is dict:
        return st.dictionaries(TEXTS, ANYTHING, max_size=3)
    if annotation in (int, float):
        low = next((b.ge if isinstance(b, Ge) else b.gt for b in metadata if isinstance(b, (Ge, Gt))), None)
        high = next((b.le if isinstance(b, Le) else b.lt for b in metadata if isinstance(b, (Le, Lt))), None)
        if annotation is int:
            return st.integers(low, high)
        return st.floats(
            low,
            high,
            allow_nan=False,
            allow_infinity=False,
            exclude_min=any(isinstance(b, Gt) for b in metadata),
            exclude_max=any(isinstance(b, Lt) for b in metadata),
        )
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return section(annotation)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        str: TEXTS,
        Path: TEXTS.map(Path),
        type(None): st.none(),
    }
    return simple[annotation]


def section(model: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: values(field.annotation, field.metadata) for name, field in model.model_fields.items()}
    return st.fixed_dictionaries(fields)


def deepspeed() -> st.SearchStrategy[dict[str, Any]]:
    """Sections of DeepSpeed's that go with any configuration."""
    zero = {"reduce_bucket_size": st.floats(1, 1e9).map(round) | st.just("auto"), "overlap_comm": st.booleans()}
    return st.fixed_dictionaries(
        {},
        optional={
            "zero_optimization": st.fixed_dictionaries({}, optional=zero),
            "steps_per_print": st.integers(1) | st.none(),
            "comms_logger": st.dictionaries(TEXTS, ANYTHING, max_size=3),
            "train_batch_size": st.just("auto"),
        },
    )


@st.composite
def configs(draw: st.DrawFn) -> Config:
    data = draw(section(Config))
    in_steps = data["train"]["max_steps"] if draw(st.booleans()) else None
    data["train"] |= {"epochs": data["train"]["epochs"] or 1, "max_steps": None}
    _grows(data["data"], data["train"])
    if data["data"]["order"] == "pages":
        data["data"]["repeats"] = 1
    # What the rules about several keys ask for.
    accumulation = data["train"]["accumulation"] or 1
    data["data"]["batch_size"] = max(1, data["data"]["batch_size"] // accumulation) * accumulation
    data["model"]["name"] = data["model"]["name"].replace(".", "_")  # behind a dot stands a tag of weights
    for named in (*data["model"]["freeze"], *data["optimizer"]["groups"]):
        named["parameters"] = f"{re.escape(named['parameters'])}$"  # none may be empty
    _freezes(data)
    if data["loss"]["name"] == "cross_entropy":
        data["loss"]["target_threshold"] = None
    if isinstance(data["loss"]["class_weights"], tuple):
        data["loss"]["class_weights"] = (*data["loss"]["class_weights"], 1.0)  # they may not all be 0
        data["model"]["num_classes"] = len(data["loss"]["class_weights"])
    if data["train"]["early_stop"] and data["model"]["num_classes"] <= 5:
        data["train"]["early_stop"]["metric"] = "top1"
    if data["train"]["accumulation"] is not None and data["train"]["max_micro_batch"] == "auto":
        data["train"]["max_micro_batch"] = None
    data["schedule"]["warmup_epochs"] = draw(st.floats(0, float(min(data["train"]["epochs"], 2**53)), exclude_max=True))
    for name, least, most in (("crop_scale", 1e-6, 1.0), ("crop_ratio", 0.01, 100.0)):
        data["data"][name] = sorted(min(abs(x) + least, most) for x in data["data"][name])
    for name in ("mean", "std"):
        data["data"][name] = [min(abs(x) + 1e-6, 1.0) for x in data["data"][name]]
    mask = (data["perturbation"] or {}).get("mask")
    if mask and "cut" in mask:
        _cut(mask)
        data["perturbation"]["norm"] = "calibrated"
    if mask and "score" in mask:
        _chosen(mask)
    if mask and "parameters" in mask:
        mask["parameters"] = tuple(re.escape(text) for text in mask["parameters"])
    if data["perturbation"] and len(set(window := data["perturbation"]["window"])) == 2:
        data["perturbation"]["window"] = tuple(sorted(window))
    elif data["perturbation"]:
        data["perturbation"]["window"] = (0.0, 1.0)
    if (data["perturbation"] or {}).get("rho_schedule") == "constant":
        data["perturbation"]["rho_final"] = 0.0
    if data["tracking"]:
        data["tracking"]["trackers"] = tuple(dict.fromkeys(data["tracking"]["trackers"]))
        for name in ("experiment", "run_name", "group"):
            data["tracking"][name] = f"{data['tracking'][name]}_"  # none may be empty
    if data["sharding"]["backend"] != "fsdp2":
        data["sharding"]["replicas"] = 1
    if perturbation := data["perturbation"]:
        if perturbation["interval"] == 1 or perturbation["adaptive"]:
            perturbation["reuse"] = 0.0
        perturbation["savings"]["keep_gathered"] &= data["sharding"]["backend"] in ("fsdp2", "zero3")
        perturbation["savings"]["graph_ascent"] &= data["sharding"]["backend"] in ("auto", "single", "ddp")
        perturbation["savings"]["graph_ascent"] &= not data["train"]["compile"]
        perturbation["preset"] = None  # which has settings of its own
        _of_the_direction(perturbation, data["sharding"])
        perturbation["savings"]["graph_ascent"] &= perturbation["direction"].get("fraction", 1.0) < 1.0
    if term := data["trajectory"]:
        data["train"]["epochs"] = max(data["train"]["epochs"], term.get("lag_epochs", 0) + 1)
        term["start_epoch"] = min(max(term["start_epoch"], term.get("lag_epochs", 0)), data["train"]["epochs"] - 1)
        if term["kind"] == "saf":
            data["loss"] |= {"mixup": 0.0, "cutmix": 0.0}
            data["data"] |= {"on_damaged": "stop", "repeats": 1}
            descent = (data["perturbation"] or {}).get("descent")
            if descent and descent["choose"] == "random":  # no pass would see all images
                data["perturbation"]["descent"] = None
    if data["sharding"]["backend"].startswith("zero"):
        data["optimizer"] |= {"name": "sgd", "kwargs": {}}
        data["train"]["precision"] = "bf16"
    data["train"]["compile"] &= data["sharding"]["backend"] != "zero3"
    data["sharding"]["deepspeed"] = draw(deepspeed()) if data["sharding"]["backend"].startswith("zero") else {}
    if in_steps is not None:  # what begins in it is known with the images
        data["train"] |= {"epochs": None, "max_steps": in_steps}
    return Config.model_validate(data)


def _freezes(data: dict[str, Any]) -> None:
    """Ends before the run does, where it ends."""
    mask = (data["perturbation"] or {}).get("mask") or {"pattern": "norm"}
    for section in data["model"]["freeze"]:
        if mask["pattern"] not in ("depth", "norm", "named"):
            section["until_epoch"] = None
        if section["until_epoch"] is not None:
            data["train"]["epochs"] = max(data["train"]["epochs"], section["until_epoch"] + 1)


def _grows(data: dict[str, Any], train: dict[str, Any]) -> None:
    if (progressive := data["progressive"]) and progressive["resolution"] >= data["resolution"]:
        data["progressive"] = None
    elif progressive:
        progressive["from_epoch"] = min(progressive["from_epoch"], 10**6 - 2)
        progressive["to_epoch"] = min(max(progressive["to_epoch"], progressive["from_epoch"] + 1), 10**6 - 1)
        train["epochs"] = max(train["epochs"], progressive["to_epoch"] + 1)


def _of_the_descent(perturbation: dict[str, Any]) -> None:
    direction = perturbation["direction"]
    if direction["source"] in ("momentum", "previous"):
        perturbation["descent"] = None
    if perturbation["descent"] is not None:
        perturbation |= {"reuse": 0.0, "gap": 0.0, "gate": None}
        if direction["fraction"] < 1.0 and perturbation["descent"]["choose"] == "sharpest":
            perturbation["descent"]["choose"] = "highest_loss"


def _of_the_direction(perturbation: dict[str, Any], sharding: dict[str, Any]) -> None:
    direction = perturbation["direction"]
    if direction.get("fraction") == 1.0:
        direction["choose"] = "first"
    if perturbation["norm"] != "masked" or direction["source"] != "fresh":
        perturbation["loss_budget"] = None
    _of_the_descent(perturbation)
    if direction.get("fraction") != 1.0 or direction["source"] != "fresh" or direction["scope"] != "global":
        perturbation["gate"] = None
    if perturbation["gate"] is not None:
        perturbation["reuse"] = 0.0
    if perturbation["adaptive"]:
        perturbation["gap"] = 0.0
    if direction["source"] != "fresh":
        perturbation |= {"norm": "masked", "reuse": 0.0, "gap": 0.0}
        return
    impossible = {
        "shard_group": sharding["replicas"] == 1,
        "worker": sharding["backend"] in ("fsdp2", "zero3"),
    }
    if impossible.get(direction["scope"]):
        direction["scope"] = "global"
    if direction["scope"] != "global" or direction["fraction"] < 1.0:
        perturbation |= {"reuse": 0.0, "gap": 0.0}


def _cut(mask: dict[str, Any]) -> None:
    if mask["policy"] == "fixed":
        mask |= {"cut": [mask["cut"][0]] * 2, "draw": "uniform"}
    mask["cut"] = sorted(mask["cut"])
    mask["cut_final"] = sorted(mask["cut_final"] or (0.5, 1.0)) if mask["draw"] == "annealed" else None
    if mask["draw"] != "cost":
        mask |= {"labels": "data", "refresh_steps": None, "refresh_epochs": None}
    elif mask["refresh_steps"] is not None:
        mask["refresh_epochs"] = None


def _chosen(mask: dict[str, Any]) -> None:
    if mask.get("dynamic"):
        mask |= {"score": None, "allocation": "global"}
    elif mask["score"] is None:
        mask["score"] = "random"
    moves = mask.get("dynamic") or mask["score"] == "accumulated" or mask.get("sparsity_final") is not None
    if mask["refresh_steps"] is not None or (moves and mask["refresh_epochs"] is None):
        mask |= {"refresh_steps": mask["refresh_steps"] or 7, "refresh_epochs": None}
    if mask["score"] != "fisher":
        mask["labels"] = "data"
    if mask["score"] != "random" and "independent" in mask:
        mask["independent"] = False
    if "n" in mask:
        mask["n"], mask["m"] = sorted((mask["n"], mask["m"]))


@relaxed
@given(configs())
def test_dump_then_load_is_the_same(tmp_path, config):
    path = tmp_path / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    assert load(path) == config


@pytest.mark.slow
@relaxed
@given(configs())
def test_other_yaml_readers_see_the_same(config):
    """A dump is read by YAML 1.1's rules elsewhere: what is text here must be text there too."""
    assert yaml.safe_load(dump(config)) == config.model_dump(mode="json")


@pytest.mark.slow
@relaxed
@given(configs())
def test_overrides_equal_the_file(tmp_path, config):
    small = tmp_path / "small.yaml"
    small.write_text(SMALL)
    overrides = []
    for name, value in config.model_dump(mode="json").items():
        if not isinstance(value, dict):
            overrides.append(f"{name}={json.dumps(value)}")
            continue
        for key, below in value.items():
            overrides.append(f"{name}.{key}={json.dumps(below)}")
    assert load(small, overrides) == config


def test_a_bracket_in_quotes_is_none_that_the_shell_has_cut(read: Any) -> None:
    assert read(SMALL, ['model.kwargs={"{": null}', "train.epochs=5"]).model.kwargs == {"{": None}


MASKS = {
    "element": "{pattern: element}",
    "dynamic": "{pattern: element, dynamic: {}}",
    "row": "{pattern: row}",
    "block": "{pattern: block}",
    "nm": "{pattern: nm}",
    "depth": "{pattern: depth}",
    "annealed": "{pattern: depth, draw: annealed, cut_final: 1}",
    "cost": "{pattern: depth, draw: cost}",
    "norm": "{pattern: norm}",
    "named": "{pattern: named, parameters: [norm]}",
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_key_is_explained(small, mask):
    printed = dump(load(small, [f"perturbation.mask={mask}"]))
    assert [line for line in printed.splitlines() if "  #" not in line] == []


SOURCES = ("fresh", "friendly", "vasso", "momentum", "previous")


def test_every_key_of_a_gate_is_explained(small):
    printed = dump(load(small, ["perturbation.gate={delta: 0.5}"]))
    assert [line for line in printed.splitlines() if "  #" not in line] == []


def test_every_key_of_a_descent_is_explained(small):
    printed = dump(load(small, ["perturbation.descent={fraction: 0.5}"]))
    assert [line for line in printed.splitlines() if "  #" not in line] == []


@pytest.mark.parametrize("source", SOURCES)
def test_every_key_of_a_direction_is_explained(small, source):
    printed = dump(load(small, [f"perturbation.direction={{source: {source}}}", "perturbation.norm=masked"]))
    assert [line for line in printed.splitlines() if "  #" not in line] == []


TERMS = {"saf": "{kind: saf, start_epoch: 1, lag_epochs: 1}", "mesa": "{kind: mesa, start_epoch: 0}"}


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_every_key_of_a_loss_term_is_explained(small, term):
    printed = dump(load(small, [f"trajectory={term}"]))
    assert [line for line in printed.splitlines() if "  #" not in line] == []


# ---- typos


def edits(key: str) -> set[str]:
    letters = "abcdefghijklmnopqrstuvwxyz_"
    pairs = [(key[:i], key[i:]) for i in range(len(key) + 1)]
    result = {a + b[1:] for a, b in pairs if b}
    result |= {a + b[1] + b[0] + b[2:] for a, b in pairs if len(b) > 1}
    result |= {a + c + b[1:] for a, b in pairs if b for c in letters}
    result |= {a + c + b for a, b in pairs for c in letters}
    return result - {key, ""}


def full(key: str) -> dict[str, Any]:
    """A configuration in which `key` and all that may stand beside it are given."""
    every = [
        *((mask, "fresh", "gate: {delta: 0.5}") for mask in MASKS.values()),
        *((MASKS["norm"], source, "") for source in SOURCES),
        (MASKS["norm"], "fresh", "descent: {fraction: 0.5}"),
    ]
    for (mask, source, extra), term in itertools.product(every, TERMS.values()):
        text = f"{SMALL}trajectory: {term}\n".replace("    pattern: depth\n    cut: [0.25, 0.75]\n", f"    {mask}\n")
        above = f"  {extra}\n" * bool(extra) + f"  direction: {{source: {source}}}\n"
        text = re.sub("  norm: .*\n", "", text).replace("  rho:", f"{above}  rho:")
        given = yaml.safe_load(text)
        given["data"] |= {"resolution": 28, "progressive": {"resolution": 8, "to_epoch": 1}}
        given["data"]["augment"] = {"policy": "rand_augment_increasing"}
        given["sharpness"] = {}
        given["train"]["early_stop"] = {"patience": 2}
        given["model"]["freeze"] = given["optimizer"]["groups"] = [{"parameters": "norm"}]
        data = Config.model_validate(given).model_dump(mode="json")
        around = data
        for part in key.split(".")[:-1]:
            around = around.get(part) or {}
            around = around[0] if isinstance(around, list) else around
        if key.rpartition(".")[2] in around:
            return data
    raise AssertionError(key)


# Of a name of one letter, every other letter is as near as any.
KEYS = [key for key in dotted_names() if len(key.rpartition(".")[2]) > 1]


@settings(relaxed, max_examples=8)
@pytest.mark.parametrize(
    "key", [key if index % 4 == 0 else pytest.param(key, marks=pytest.mark.slow) for index, key in enumerate(KEYS)]
)
@given(st.data())
def test_a_typo_names_the_key(tmp_path, key, data):
    config = full(key)
    *above, name = key.split(".")
    around, places = config, []
    for part in above:
        around, places = around[part], [*places, part]
        if isinstance(around, list):
            around, places = around[0], [*places, "0"]
    others = set().union(*(edits(other) for other in around if other != name))
    typo = data.draw(st.sampled_from(sorted(edits(name) - set(around) - others)))
    changed = {typo if k == name else k: v for k, v in around.items()}
    around.clear()
    around.update(changed)
    path = tmp_path / "typo.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    begins = re.compile(rf" *(- )?{re.escape(typo)}:")
    line = next(i for i, text in enumerate(path.read_text().split("\n"), 1) if begins.match(text))
    with pytest.raises(UserError) as caught:
        load(path)
    wrong, meant = (".".join([*places, each]) for each in (typo, name))
    assert str(caught.value) == f"{path}:{line}: {wrong}: unknown key; did you mean {meant}?"


# ---- what a value is


@pytest.mark.parametrize(
    ("given", "value"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("1.e+2", 100.0), (".5", 0.5), ("+3", 3.0), ("010", 10.0), ("1", 1.0)],
)
def test_numbers(read, given, value):
    assert read(SMALL.replace("lr: 0.1", f"lr: {given}")).optimizer.lr == value
    assert read(SMALL, [f"optimizer.lr={given}"]).optimizer.lr == value


@pytest.mark.parametrize("word", ["on", "off", "yes", "No", "y", "1:30", "2026-11-21", "1_000", "0x10", ".nan", "1e"])
def test_words(read, word):
    assert read(SMALL, [f"tracking.run_name={word}"]).tracking.run_name == word


def test_masks(read):
    def mask(text):
        return read(SMALL, [f"perturbation.mask={text}"]).perturbation.mask

    assert (mask("{pattern: element}").score, mask("{pattern: element}").refresh_epochs) == ("fisher", 1)
    by_steps = mask("{pattern: row, refresh_steps: 50, allocation: erk}")
    assert (by_steps.refresh_steps, by_steps.refresh_epochs, by_steps.allocation) == (50, None, "erk")
    assert mask("{pattern: block, refresh_epochs: null, refresh_steps: 3}").is_refreshed
    assert not mask("{pattern: tensor, refresh_epochs: null}").is_refreshed
    drifting = mask("{pattern: element, dynamic: {grow: fisher}, sparsity: 0.8}")
    assert (drifting.score, drifting.scores, drifting.by_samples) == (
        None,
        ("gradient", "fisher"),
        ("gradient", "fisher"),
    )
    assert mask("{pattern: element, labels: sampled}").by_samples == ("fisher",)
    assert mask("{pattern: nm, score: weight}").by_samples == ()
    assert (mask("{pattern: nm}").n, mask("{pattern: nm}").m) == (2, 4)
    assert (mask("{pattern: depth}").draw, mask("{pattern: depth}").refresh_epochs) == ("uniform", None)
    assert mask("{pattern: depth, draw: annealed, cut_final: 1}").cut_final == (1.0, 1.0)
    by_cost = mask("{pattern: depth, draw: cost}")
    assert (by_cost.refresh_epochs, by_cost.samples, by_cost.by_samples) == (1, 128, ("fisher",))
    assert not mask("{pattern: depth, draw: cost, refresh_epochs: null}").is_refreshed
    assert mask("{pattern: named, parameters: [a, b.*c]}").parameters == ("a", "b.*c")


@pytest.mark.parametrize(
    ("mask", "method"),
    [
        ("{pattern: element, dynamic: {}}", "ssam-dynamic"),
        ("{pattern: nm, n: 1}", "ssam-nm"),
        ("{pattern: norm}", "ssam-norm"),
        ("null", "sam"),
    ],
)
def test_methods(read, mask, method):
    assert read(SMALL, [f"perturbation.mask={mask}"]).method == method


def test_a_loss_term_is_a_method_of_its_own_and_beside_another(read):
    for kind, term in TERMS.items():
        assert read(SMALL, ["perturbation=null", f"trajectory={term}"]).method == kind
        assert read(SMALL, ["perturbation.mask=null", f"trajectory={term}"]).method == f"sam+{kind}"
        assert read(SMALL, [f"trajectory={term}"]).method == f"ssam-depth+{kind}"
    given = read(SMALL, ["trajectory={kind: saf}", "train.epochs=6"]).trajectory
    assert given.model_dump() == {"kind": "saf", "weight": 0.3, "temperature": 5.0, "lag_epochs": 3, "start_epoch": 5}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.mixup=0.2"], r"remembers the outputs of single images, and loss\.mixup 0\.2 mixes each .*; use mesa"),
        (["loss.cutmix=1"], r"loss\.cutmix 1\.0 mixes each with another one in each epoch"),
        (["data.on_damaged=skip"], r"data\.on_damaged skip shows another one in the place of a damaged one; use mesa"),
        (
            ["perturbation={rho: 1, direction: {fraction: 0.5}, descent: {fraction: 0.5, choose: random}}"],
            r"no pass sees all of them with perturbation\.direction\.fraction 0\.5 and perturbation\.descent\.choose",
        ),
    ],
)
def test_what_saf_cannot_remember_is_one_line_and_goes_with_mesa(read, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        read(SMALL, ["perturbation.mask=null", f"trajectory={TERMS['saf']}", *overrides])
    assert "\n" not in str(caught.value)
    read(SMALL, ["perturbation.mask=null", f"trajectory={TERMS['mesa']}", *overrides])


def test_null_and_sections(read):
    assert read(SMALL, ["perturbation=null"]).method == "base"
    assert read(SMALL, ["perturbation.mask=null"]).method == "sam"
    assert read(SMALL, ["perturbation=null", "perturbation.rho=0.5"]).perturbation.model_dump()["rho"] == 0.5
    assert read(SMALL, ["perturbation.mask=null", "perturbation.mask.pattern=tensor"]).method == "ssam-tensor"
    assert read(SMALL, ["perturbation.mask={pattern: element, sparsity: 0.9}"]).perturbation.mask.sparsity == 0.9
    assert read(SMALL, ["perturbation.mask.cut=0.5"]).perturbation.mask.cut == (0.5, 0.5)
    assert read(SMALL, ["model.kwargs.img_size=1", "model.kwargs.x.y=[a, 1]"]).model.kwargs == {
        "img_size": 1,
        "x": {"y": ["a", 1]},
    }
    assert read(SMALL, ["train.seed=1", "train.seed=2"]).train.seed == 2
    assert read(SMALL, ["tracking.uri=sqlite:///a=b.db"]).tracking.uri == "sqlite:///a=b.db"
    assert read(SMALL).data.train == Path("data/train.beton")


def test_no_tracking_stays_off_unless_trackers_are_named(read):
    off = f"{SMALL}tracking: null\n"
    assert read(SMALL).tracking.trackers == ("mlflow",)
    assert read(off).tracking.trackers == read(SMALL, ["tracking=null"]).tracking.trackers == ()
    kept = read(off, ["tracking.log_every=7", "tracking.group=g"]).tracking
    assert (kept.trackers, kept.store, kept.log_every, kept.group) == ((), None, 7, "g")
    assert read(off, ["tracking.trackers=[tensorboard]"]).tracking.trackers == ("tensorboard",)
    assert read(off, ["tracking={log_every: 7}"]).tracking.store == "sqlite:///mlflow.db"
