"""What a run names as a part of its checkpoints is saved and restored, and nothing is loaded of what does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from ssam_scale.config.load import load
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.perturbation import no_phases
from ssam_scale.perturbation.loss import LossFn
from ssam_scale.sharding import World
from ssam_scale.train import checkpoint, loop
from ssam_scale.train.build import Components, build, build_hooks
from ssam_scale.train.checkpoint import parts
from ssam_scale.train.hooks import Hook
from ssam_scale.train.progress import Progress
from tests.support.runs import VIT, run_length, ssam_scale, write_config

EVERYTHING: dict[str, Any] = {
    "model": VIT,
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "train": {"epochs": 2, "ema_decay": 0.5, "precision": "fp16"},
    "perturbation": {
        "rho": 0.05,
        "norm": "calibrated",
        "interval": 2,
        "reuse": 0.5,
        "mask": {"pattern": "row", "score": "accumulated", "refresh_steps": 2},
    },
}


def make(home: Path, data: Path, seed: int, **changes: Any) -> tuple[Config, Components]:
    """A run with every part that a checkpoint may have."""
    sections = {**EVERYTHING, **changes}
    config = load(write_config(home / "run.yaml", data, **sections), [f"train.seed={seed}"])
    return config, build(config, World(), no_phases, run_length(config))


def take_steps(components: Components, loss_fn: LossFn, steps: int) -> None:
    batches = iter(components.train)
    for _ in range(steps):
        if components.opt.refresh_is_due:
            components.opt.refresh()
        components.opt.step(loss_fn, next(batches))
        if components.ema is not None:
            components.ema.update()
        components.progress.after_step()
    batches.close()


def same(one: Any, two: Any) -> bool:
    """Whether two states are equal, bit for bit; tuples and lists are alike."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one.nan_to_num(), two.nan_to_num())
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return bool(one == two)


def states(components: Components) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in components.state.items()}


def copied(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    return [copied(value) for value in state] if isinstance(state, (list, tuple)) else state


def test_every_named_part_comes_back(home: Path, data: Path) -> None:
    config, first = make(home, data, seed=1)
    take_steps(first, first.loss_fn, first.steps_per_epoch)
    first.progress.after_epoch()
    first.progress.run_id = "a run"
    first.unrecorded.losses, first.unrecorded.densities = [torch.tensor(0.1), torch.tensor(0.3)], [0.5, 1.0]
    before = copied(states(first))
    assert before.keys() == {"sparse", "model", "optimizer", "progress", "scaler", "ema", "unrecorded", "buffers"}
    checkpoint.save(config, World(), first)
    path = home / "checkpoints/epoch_0001"
    assert {p.name for p in path.iterdir()} == {
        "state.json",
        *(f"{name}.safetensors" for name in ("sparse", "model", "optimizer", "ema", "unrecorded")),
    }
    assert load_file(path / "model.safetensors").keys() == first.network.state_dict().keys()

    config, second = make(home, data, seed=2)
    take_steps(second, second.loss_fn, 1)
    unlike = states(second)
    alone = {"buffers"}  # one process has none that others have not
    assert not any(same(before[name], unlike[name]) for name in before.keys() - {"scaler"} - alone)
    checkpoint.load(path, config, second)
    after = states(second)
    assert [name for name in before if not same(before[name], after[name])] == []


def test_a_mask_that_does_not_fit_is_refused_before_anything_is_loaded(home: Path, data: Path) -> None:
    config, first = make(home, data, seed=1)
    first.opt.refresh()
    checkpoint.save(config, World(), first)
    mask = {**EVERYTHING["perturbation"]["mask"], "score": "random"}
    config, second = make(home, data, seed=2, perturbation={**EVERYTHING["perturbation"], "mask": mask})
    before = copied(states(second))
    with pytest.raises(
        UserError, match=r"the saved state has accumulated scores, .* needs none; perturbation\.mask must"
    ):
        checkpoint.load(home / "checkpoints/epoch_0000", config, second)
    assert same(states(second), before)


class Counter(Hook):
    """A hook with a state of its own, as somebody else may write it."""

    def __init__(self) -> None:
        self.seen = torch.zeros(2, dtype=torch.int64)
        self.text: list[Any] = []

    def after_step(self, progress: Progress, report: Any) -> None:
        self.seen += 1
        self.text.append([progress.step, report.kind])

    def state_dict(self) -> dict[str, Any]:
        return {"seen": {"steps": self.seen}, "text": self.text}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen.copy_(state_dict["seen"]["steps"])
        self.text = list(state_dict["text"])


@contextmanager
def counting(counter: Counter) -> Iterator[Counter]:
    """Runs inside have the counter as a hook and as a part of their checkpoints."""

    def build_with(*args: Any, **kwargs: Any) -> Components:
        components = build(*args, **kwargs)
        components.state["counter"] = counter
        return components

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build", build_with)
        patch.setattr(loop, "build_hooks", lambda *args: [*build_hooks(*args), counter])
        yield counter


@pytest.mark.slow
def test_a_part_of_ones_own_is_saved_and_resumed_with_a_run(
    home: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("train", "--config", write_config(home / "run.yaml", data), "--resume", "auto")
    with counting(Counter()):
        assert ssam_scale(*run, "train.epochs=1") == 0
    with counting(Counter()) as resumed:
        assert ssam_scale(*run) == 0
    assert resumed.seen.tolist() == [8, 8]
    assert resumed.text == [[step, "base"] for step in range(1, 9)]
    path = home / "checkpoints/epoch_0002"
    assert load_file(path / "counter.safetensors")["seen.steps"].tolist() == [8, 8]
    parts = json.loads((path / "state.json").read_text())["parts"]
    assert parts["counter"] == {"seen": {"steps": {"$tensor": "seen.steps"}}, "text": resumed.text}

    assert ssam_scale(*run, "train.epochs=3") == 0  # without it
    capsys.readouterr()
    with counting(Counter()):
        assert ssam_scale(*run, "train.epochs=4") == 2
    assert "epoch_0003 has no counter" in capsys.readouterr().err


TENSORS = st.builds(torch.tensor, st.lists(st.integers(0, 255), max_size=3))
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
NAMES = st.text("abc", min_size=1)
STATES = st.dictionaries(
    NAMES,
    st.recursive(TENSORS | PLAIN, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner), max_leaves=12),
)


@given(STATES)
def test_tensors_are_split_off_and_joined_again(state: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    plain = json.loads(json.dumps(parts.split(state, tensors)))
    assert same(parts.join(plain, tensors), state)


def test_what_no_checkpoint_can_hold_is_named() -> None:
    with pytest.raises(TypeError, match=r"cannot hold gate\.seen, which is a set"):
        parts.split({"gate": {"seen": {1, 2}}}, {})
    with pytest.raises(TypeError, match="cannot hold gate, which is a dict"):
        parts.split({"gate": {1: 2}}, {})
    with pytest.raises(ValueError, match=r"two tensors of a checkpoint have the name a\.b"):
        parts.split({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, {})
