"""Every mistake is one line that names the key, the place and what would work."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

from ssam_scale import config
from ssam_scale.config.load import load
from ssam_scale.errors import UserError
from tests.support.configs import SMALL


def swap(old: str, new: str) -> str:
    assert SMALL.count(old) == 1, old
    return SMALL.replace(old, new)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # unknown keys
        (swap("  lr: 0.1", "  lt: 0.1"), "given.yaml:10: optimizer.lt: unknown key; did you mean optimizer.lr?"),
        (swap("perturbation:", "pertubation:"), "given.yaml:11: pertubation: unknown key; did you mean perturbation?"),
        (
            swap("    cut:", "    cuts:"),
            "given.yaml:15: perturbation.mask.cuts: unknown key; did you mean perturbation.mask.cut?",
        ),
        (
            swap("pattern:", "patern:"),
            "given.yaml:14: perturbation.mask.patern: unknown key; did you mean perturbation.mask.pattern?",
        ),
        (SMALL + "  lr: 3\n", "given.yaml:18: train.lr: unknown key; did you mean optimizer.lr?"),
        (
            swap("    cut: [0.25, 0.75]", "    sparsity: 0.5"),
            'given.yaml:15: perturbation.mask.sparsity: unknown key for pattern "depth", '
            "which has pattern, policy, cut, draw, cut_final, samples, labels, refresh_steps, refresh_epochs",
        ),
        (
            SMALL + "  zzz: 3\n",
            "given.yaml:18: train.zzz: unknown key; "
            "train has epochs, max_steps, device, precision, accumulation, max_micro_batch, activation_checkpointing, "
            "compile, ema_decay, ema_warmup, on_nonfinite, max_skips, max_rollbacks, seed, eval_epochs, early_stop",
        ),
        # values
        (swap("128", "abc"), 'given.yaml:7: data.batch_size: must be a whole number, given "abc"'),
        (swap("128", "12.5"), "given.yaml:7: data.batch_size: must be a whole number, given 12.5"),
        (swap("128", "true"), "given.yaml:7: data.batch_size: must be a whole number, given true"),
        (swap("128", "'128'"), 'given.yaml:7: data.batch_size: must be a whole number, given "128"'),
        (swap("128", "0"), "given.yaml:7: data.batch_size: must be greater than or equal to 1, given 0"),
        (swap("128", ""), "given.yaml:7: data.batch_size: must be a whole number, given null"),
        (swap("lr: 0.1", "lr: .inf"), 'given.yaml:10: optimizer.lr: must be a number, given ".inf"'),
        (swap("name: resnet18", "name: 18"), "given.yaml:2: model.name: must be text, given 18"),
        (
            swap("[0.25, 1.0]", "[5, 10]"),
            "given.yaml:8: data.crop_scale: must be shares of the image's area, at most 1, given [5, 10]",
        ),
        (swap("[0.25, 1.0]", "[0.25]"), "given.yaml:8: data.crop_scale: item number 2 is missing"),
        (swap("[0.25, 1.0]", "[0.25, x]"), 'given.yaml:8: data.crop_scale.1: must be a number, given "x"'),
        (
            swap("[0.25, 1.0]", "[1, 2, 3]"),
            "given.yaml:8: data.crop_scale: must have at most 2 items, not 3, given [1, 2, 3]",
        ),
        (
            swap("[0.25, 1.0]", "[1.0, 0.25]"),
            "given.yaml:8: data.crop_scale: must be two positive numbers, the smaller first, given [1.0, 0.25]",
        ),
        (
            swap("pattern: depth", "pattern: dept"),
            "given.yaml:14: perturbation.mask.pattern: must be element, row, tensor, block, nm, depth, norm or named, "
            'given "dept"; '
            "did you mean depth?",
        ),
        (
            SMALL + "  precision: fp31\n",
            'given.yaml:18: train.precision: must be fp32, bf16 or fp16, given "fp31"; did you mean fp32?',
        ),
        (SMALL + "loss: 3\n", "given.yaml:18: loss: must be a section with keys of its own, given 3"),
        (
            SMALL.replace("  epochs: 3\n", ""),
            "given.yaml:16: train: must be a section with keys of its own, given null",
        ),
        # missing
        (
            SMALL.replace("  epochs: 3\n", "  seed: 3\n"),
            "given.yaml:16: train: epochs is missing, or max_steps: one of them says how long the run is",
        ),
        (
            SMALL + "  max_steps: 100\n",
            "given.yaml:17: train: epochs 3 and max_steps 100 both say how long the run is; leave one of them out, or "
            "set it to null (train.epochs=null)",
        ),
        (SMALL.replace("optimizer:\n  lr: 0.1\n", ""), "given.yaml: optimizer is missing"),
        (
            SMALL.replace("    pattern: depth\n    cut: [0.25, 0.75]", "    {}"),
            "given.yaml:13: perturbation.mask.pattern is missing; it is element, row, tensor, "
            "block, nm, depth, norm or named",
        ),
        # combinations
        (
            swap("[0.25, 0.75]", "[0.75, 0.25]"),
            "given.yaml:15: perturbation.mask: cut: the lowest depth 0.75 lies above the highest 0.25; "
            "write [0.25, 0.75]",
        ),
        (
            swap("  rho: 0.2", "  norm: dense\n  rho: 0.2"),
            "given.yaml:12: perturbation: norm: dense needs the gradient of the prefix, "
            "and pattern depth computes none; use masked, or calibrated for the same length",
        ),
        (
            swap("  rho: 0.2", "  rho_final: 0.5\n  rho: 0.2"),
            "given.yaml:12: perturbation: rho_final 0.5 needs a rho_schedule, cosine or lr; constant has no end",
        ),
        (
            swap("  rho: 0.2", "  direction:\n    fraction: 0.0\n  rho: 0.2"),
            "given.yaml:13: perturbation.direction.fraction: must be greater than 0, given 0.0",
        ),
        (
            swap("  rho: 0.2", "  window: [0.5, 0.5]\n  rho: 0.2"),
            "given.yaml:12: perturbation.window: must be two shares, the smaller first, given [0.5, 0.5]",
        ),
        (
            SMALL + "  compile: true\nsharding: {backend: zero3}\n",
            "given.yaml:18, given.yaml:19: train.compile: sharding.backend zero3 gathers the weights of each layer in "
            "hooks, which compiled blocks do not wait for; use fsdp2, or zero2",
        ),
        (
            swap("  rho: 0.2", "  savings: {graph_ascent: true}\n  rho: 0.2") + "sharding: {backend: fsdp2}\n",
            "given.yaml:12, given.yaml:19: perturbation.savings.graph_ascent is for sharding.backend single or ddp, "
            "and it is fsdp2",
        ),
        (
            swap("  rho: 0.2", "  savings: {graph_ascent: true}\n  rho: 0.2") + "  compile: true\n",
            "given.yaml:12, given.yaml:19: perturbation.savings.graph_ascent is for a network that is not compiled, "
            "and train.compile is true; use one of them",
        ),
        (
            swap("  rho: 0.2", "  savings: {graph_ascent: true}\n  rho: 0.2"),
            "given.yaml:12: perturbation.savings.graph_ascent is for an ascent on part of the batch; lower "
            "perturbation.direction.fraction, or leave it off",
        ),
        (
            SMALL + "  precision: fp16\nsharding: {backend: zero2}\n",
            "given.yaml:18, given.yaml:19: train.precision fp16 needs loss scaling, which sharding.backend zero2 "
            "leaves to DeepSpeed's own fp16; use bf16, or the backends ddp or fsdp2",
        ),
        (
            SMALL + "  accumulation: 3\n",
            "given.yaml:7, given.yaml:18: data.batch_size 128 is not a multiple of train.accumulation 3",
        ),
        (
            SMALL + "  accumulation: 2\n  max_micro_batch: auto\n",
            "given.yaml:19: train: max_micro_batch auto chooses the accumulation, and accumulation is 2; leave one of "
            "them out",
        ),
        *(
            (
                SMALL + f"  max_micro_batch: {value}\n",
                "given.yaml:18: train.max_micro_batch: must be a whole number of at least 1, auto or null, given "
                + shown,
            )
            for value, shown in {"0": "0", "1.5": "1.5", "true": "true", "atuo": '"atuo"', "[1]": "[1]"}.items()
        ),
        # not YAML, or not ours
        (SMALL + "  epochs: 4\n", "given.yaml:18: train.epochs: given twice, first in line 17"),
        (SMALL + "train: {}\n", "given.yaml:18: train: given twice, first in line 16"),
        (SMALL + "  a: b: c\n", "given.yaml:18:7: not YAML: mapping values are not allowed here"),
        (SMALL + "\tseed: 3\n", "given.yaml:18:1: not YAML: a tab; lines are indented with spaces"),
        (SMALL + "x: \x01\n", "given.yaml:18: not YAML: character '\\x01' is not allowed"),
        ("x: [\n", "given.yaml:2:1: not YAML: expected the node content, but found '<stream end>'"),
        ("a: &a [*a]\n", "given.yaml:1: the anchor contains itself"),
        (
            "a: !!python/name:os.system\n",
            "given.yaml:1: the type !!python/name:os.system has no place in a configuration",
        ),
        ("[a]: 3\n", "given.yaml:1: a key must be a word, not a list or a section"),
        ("- 3\n", "given.yaml:1: a configuration is a section with keys, this is [3]"),
        ("a: 1\n@\n", "given.yaml:2:1: not YAML: found character '@' that cannot start any token"),
    ],
)
def test_in_the_file(complaint, text, message):
    said = complaint(text)
    assert "\n" not in said
    assert said == message or said.startswith(f"{message} while "), said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=abc", 'override data.batch_size=abc: data.batch_size: must be a whole number, given "abc"'),
        (
            "data.batch_sise=3",
            "override data.batch_sise=3: data.batch_sise: unknown key; did you mean data.batch_size?",
        ),
        ("batch_size=3", "override batch_size=3: batch_size: unknown key; did you mean data.batch_size?"),
        ("pertubation.rho=3", "override pertubation.rho=3: pertubation: unknown key; did you mean perturbation?"),
        (
            "perturbation.mask={pattern: element, sparsity: 1.5}",
            "override perturbation.mask={pattern: element, sparsity: 1.5}: "
            "perturbation.mask.sparsity: must be less than 1, given 1.5",
        ),
        (
            "trajectory=saf",
            'override trajectory=saf: trajectory: must be a section with keys of its own, given "saf"; write '
            "'trajectory={kind: saf}'",
        ),
        (
            "trajectory={kind: saff}",
            'override trajectory={kind: saff}: trajectory.kind: must be saf or mesa, given "saff"; did you mean saf?',
        ),
        ("trajectory.weight=1", "override trajectory.weight=1: trajectory.kind is missing; it is saf or mesa"),
        (
            "trajectory={kind: saf, start_epoch: 2}",
            "override trajectory={kind: saf, start_epoch: 2}: trajectory: start_epoch 2 is before lag_epochs 3, so "
            "that nothing is remembered of 3 epochs before; begin in epoch 3 or later",
        ),
        (
            "trajectory={kind: saf, start_epoch: 1, lag_epochs: 2}",
            "override trajectory={kind: saf, start_epoch: 1, lag_epochs: 2}: trajectory: start_epoch 1 is before "
            "lag_epochs 2, so that nothing is remembered of 2 epochs before; begin in epoch 2 or later",
        ),
        (
            "trajectory={kind: mesa}",
            "given.yaml:17: trajectory.start_epoch 5 must be less than train.epochs 3, or no epoch has the term",
        ),
        (
            "data.progressive={resolution: 300, to_epoch: 2}",
            "given.yaml:4: data: progressive.resolution 300 must be less than resolution 224, which it grows to",
        ),
        (
            "data.progressive={resolution: 128, to_epoch: 3}",
            "given.yaml:17: data.progressive.to_epoch 3 must be less than train.epochs 3, or no epoch has crops of "
            "data.resolution 224",
        ),
        (
            "data.progressive={resolution: 128, from_epoch: 2, to_epoch: 2}",
            "override data.progressive={resolution: 128, from_epoch: 2, to_epoch: 2}: data.progressive: to_epoch 2 "
            "must be more than from_epoch 2",
        ),
        (
            "data.progressive={resolution: 128}",
            "override data.progressive={resolution: 128}: data.progressive.to_epoch is missing",
        ),
        ("train.epochs", "override train.epochs: an override is written key=value, for example train.epochs=3"),
        ("=3", "override =3: an override is written key=value, for example train.epochs=3"),
        ("train..epochs=3", "override train..epochs=3: an override is written key=value, for example train.epochs=3"),
        ("train.epochs.x=3", "override train.epochs.x=3: train.epochs is a value (3), not a section with keys"),
        (
            "tracking.run_name=a: b",
            "override tracking.run_name=a: b: not one value; "
            "quote a text, or write a list [a, b] or a section {key: value}",
        ),
        (
            "tracking.run_name=@x",
            "override tracking.run_name=@x: not YAML: found character '@' that cannot start any token",
        ),
        (
            "train.accumulation=3",
            "given.yaml:7, override train.accumulation=3: "
            "data.batch_size 128 is not a multiple of train.accumulation 3",
        ),
        (
            "schedule.warmup_epochs=3",
            "override schedule.warmup_epochs=3, given.yaml:17: "
            "schedule.warmup_epochs 3.0 must be less than train.epochs 3",
        ),
    ],
)
def test_in_an_override(complaint, override, message):
    said = complaint(SMALL, [override])
    assert said == message or said.startswith(f"{message} while "), said


MASKS = {
    # keys of other patterns
    "{pattern: row, dynamic: {}}": '.dynamic: unknown key for pattern "row", which has pattern, score, samples, '
    "labels, refresh_steps, refresh_epochs, sparsity, sparsity_final, allocation",
    "{pattern: tensor, allocation: erk}": '.allocation: unknown key for pattern "tensor", which has pattern, score, '
    "samples, labels, refresh_steps, refresh_epochs, sparsity, sparsity_final, independent",
    "{pattern: tensor, independent: true}": ": independent: is for score random, and score is fisher; leave one of "
    "them out",
    "{pattern: norm, sparsity: 0.5}": '.sparsity: unknown key for pattern "norm", which has pattern',
    "{pattern: nm, sparsity: 0.5}": '.sparsity: unknown key for pattern "nm", which has pattern, score, samples, '
    "labels, refresh_steps, refresh_epochs, n, m, others, indivisible",
    "{pattern: element, dynamic: {drop_rte: 1}}": ".dynamic.drop_rte: unknown key; did you mean "
    "perturbation.mask.dynamic.drop_rate?",
    # values
    "{pattern: element, score: fishr}": ".score: must be fisher, gradient, accumulated, weight or random, "
    'given "fishr"; did you mean fisher?',
    "{pattern: row, score: null}": ".score: must be fisher, gradient, accumulated, weight or random, given null",
    "{pattern: block, sparsity: 1}": ".sparsity: must be less than 1, given 1",
    "{pattern: element, sparsity_final: 1.0}": ".sparsity_final: must be less than 1, given 1.0",
    "{pattern: element, sparsity_final: -0.1}": ".sparsity_final: must be greater than or equal to 0, given -0.1",
    "{pattern: row, allocation: 0.5}": ".allocation: must be global, uniform or erk, given 0.5",
    "{pattern: element, samples: 0}": ".samples: must be greater than or equal to 1, given 0",
    "{pattern: element, labels: true}": ".labels: must be data or sampled, given true",
    "{pattern: tensor, refresh_steps: 0}": ".refresh_steps: must be greater than or equal to 1, given 0",
    "{pattern: tensor, refresh_epochs: 0.5}": ".refresh_epochs: must be a whole number, given 0.5",
    "{pattern: element, dynamic: 0.5}": ".dynamic: must be a section with keys of its own, given 0.5",
    "{pattern: element, dynamic: {drop_rate: 2}}": ".dynamic.drop_rate: must be less than or equal to 1, given 2",
    "{pattern: element, dynamic: {grow: best}}": ".dynamic.grow: must be fisher, gradient, accumulated, weight or "
    'random, given "best"',
    "{pattern: nm, n: 0}": ".n: must be greater than or equal to 1, given 0",
    "{pattern: nm, others: 1}": ".others: must be perturbed or unperturbed, given 1",
    "{pattern: nm, indivisible: padded}": '.indivisible: must be refused, perturbed or unperturbed, given "padded"',
    "{pattern: named}": ".parameters is missing",
    "{pattern: named, parameters: norm}": '.parameters: must be a list, given "norm"',
    "{pattern: named, parameters: []}": ".parameters: must have at least 1 item, not 0, given []",
    "{pattern: named, parameters: [norm, 'a(']}": '.parameters: "a(" is not a regular expression: missing ), '
    'unterminated subpattern at position 1, given ["norm", "a("]',
    # combinations
    "{pattern: row, refresh_epochs: 1, refresh_steps: 5}": ": refresh_steps 5 and refresh_epochs 1 cannot both be; "
    "leave one of them out, or set it to null",
    "{pattern: element, dynamic: {}, score: fisher}": ": score: leave it out with dynamic, whose drop and grow say "
    "what the mask is chosen by",
    "{pattern: element, score: null}": ": score: null is for dynamic; without it, name a score",
    "{pattern: element, dynamic: {}, allocation: erk}": ": allocation: erk is for a choice by score; dynamic has "
    "global only",
    "{pattern: element, dynamic: {}, refresh_epochs: null}": ": dynamic: drops and grows at refreshes; give "
    "refresh_epochs or refresh_steps",
    "{pattern: block, sparsity_final: 0.9, refresh_epochs: null}": ": sparsity_final: takes refreshes to get there; "
    "give refresh_epochs or refresh_steps",
    "{pattern: nm, score: accumulated, refresh_epochs: null}": ": score: accumulated needs refreshes, as there is "
    "nothing yet when the mask is chosen first; give refresh_epochs or refresh_steps",
    "{pattern: tensor, score: weight, labels: sampled}": ": labels: sampled is for score fisher, and the mask is "
    "chosen by weight; use data",
    "{pattern: element, dynamic: {}, labels: sampled}": ": labels: sampled is for score fisher, and the mask is "
    "chosen by gradient and random; use data",
    "{pattern: nm, n: 5}": ": n: 5 of every 4 cannot be; n must not be more than m",
    # draws of a moving cut
    "{pattern: depth, draw: costs}": '.draw: must be uniform, annealed or cost, given "costs"; did you mean cost?',
    "{pattern: depth, draw: annealed}": ": draw: annealed moves from cut to cut_final; give cut_final",
    "{pattern: depth, cut_final: 0.5}": ": cut_final: is for draw annealed, and draw is uniform",
    "{pattern: depth, draw: annealed, cut_final: [1, 0.5]}": ": cut_final: the lowest depth 1.0 lies above the "
    "highest 0.5; write [0.5, 1.0]",
    "{pattern: depth, policy: fixed, cut: 0.5, draw: cost}": ": draw: cost is for policy rotate; policy fixed draws "
    "nothing",
    "{pattern: depth, refresh_epochs: 1}": ": refresh_epochs: is for draw cost, and draw is uniform, which measures "
    "nothing",
    "{pattern: depth, labels: sampled}": ": labels: sampled is for draw cost, and draw is uniform",
    "{pattern: depth, draw: cost, refresh_epochs: 1, refresh_steps: 5}": ": refresh_steps 5 and refresh_epochs 1 "
    "cannot both be; leave one of them out, or set it to null",
}


@pytest.mark.parametrize(("mask", "message"), MASKS.items(), ids=MASKS)
def test_in_a_mask(complaint, mask, message):
    override = f"perturbation.mask={mask}"
    assert complaint(SMALL, [override]) == f"override {override}: perturbation.mask{message}"


def test_several_are_told_together(complaint):
    assert complaint(swap("128", "abc"), ["optimizer.lrr=2", "train.epochs=0"]).split("\n") == [
        "given.yaml: 3 mistakes in the configuration",
        '  given.yaml:7: data.batch_size: must be a whole number, given "abc"',
        "  override optimizer.lrr=2: optimizer.lrr: unknown key; did you mean optimizer.lr?",
        "  override train.epochs=0: train.epochs: must be greater than or equal to 1, given 0",
    ]


def test_no_file(small: Path, tmp_path: Path):
    for path, message in {
        tmp_path / "smal.yaml": f"{tmp_path}/smal.yaml: no such file; the nearest in {tmp_path} is small.yaml",
        tmp_path / "no" / "a.yaml": f"{tmp_path}/no/a.yaml: no such file: there is no folder {tmp_path}/no",
        tmp_path: f"{tmp_path}: is a folder; give the YAML file of a run",
    }.items():
        with pytest.raises(UserError) as caught:
            load(path)
        assert str(caught.value) == message
    small.write_bytes(b"model: \xff\xfe")
    with pytest.raises(UserError, match="not a text file"):
        load(small)


def test_configuration_needs_nothing_of_ours():
    for source in Path(config.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("ssam_scale"):
                assert str(node.module).startswith(("ssam_scale.config", "ssam_scale.errors")), source


# ---- what would take hours or all memory


def doubled(levels: int) -> str:
    """A few lines whose anchors repeat each other: as many values as 9 to the power of the levels."""
    names = [chr(ord("a") + level) for level in range(levels)]
    lines = ["a: &a [" + ",".join("x" * 9) + "]"]
    lines += [f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]" for before, name in itertools.pairwise(names)]
    return "\n".join(lines) + "\n"


BOMBS = {
    "anchors": (doubled(12), r"given\.yaml:1: not a configuration: more than 10,000 values"),
    "deep lists": ("a: " + "[" * 5000 + "]" * 5000, r"nested deeper than 32 levels"),
    "less deep lists": ("a: " + "[" * 40 + "]" * 40, r"given\.yaml:1: .* nested deeper than 32 levels"),
    "deep sections": ("a: " + "{b: " * 60 + "1" + "}" * 60, r"nested deeper than 32 levels"),
    "a long number": ("a: " + "9" * 5000, r"given\.yaml:1: a number of 5,000 characters"),
    "a long fraction": ("a: 0." + "9" * 5000, r"given\.yaml:1: a number of 5,002 characters"),
    "many values": ("a: [" + "1," * 20000 + "]", "more than 10,000 values"),
    "a long text": ("a: " + "x" * 2**20, r"given\.yaml: .* longer than 1,048,576 characters"),
}


@pytest.mark.parametrize(("text", "said"), BOMBS.values(), ids=BOMBS)
def test_what_is_too_much_for_a_configuration(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "given.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        load(path)


def test_a_device_that_never_ends() -> None:
    with pytest.raises(UserError, match=r"/dev/zero: not a configuration: it is longer than 1,048,576 characters"):
        load(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("value", "said"),
    [("9" * 3000, "a number of 3,000 characters"), ("[" * 3000 + "]" * 3000, "nested deeper than 32 levels")],
)
def test_what_is_too_much_for_an_override(small: Path, value: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(small, [f"train.epochs={value}"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": ' + "9" * 5000 + "}", "a number in it is thousands of digits long"),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
    ],
)
def test_what_is_too_much_for_a_file_of_deepspeeds(small: Path, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        load(small, deepspeed=str(path))
