"""A DeepSpeed that is missing, too old, too new or on another device is told in one line, before anything is built."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import pytest
import torch

from ssam_scale.errors import UnsupportedVersionError, UserError
from ssam_scale.sharding.zero import engine, version
from tests.support.checkout import ROOT

CPU = torch.device("cpu")


@pytest.mark.parametrize("known", ["0.19.8", "0.19.8+fba4f0b", "0.19.9", "0.19.10rc1"])
def test_versions_in_range(known: str) -> None:
    version.check_version(known)


@pytest.mark.parametrize("other", ["0.14.0", "0.19.7", "0.20.0", "0.20.1+abc", "1.0.0"])
def test_versions_out_of_range(other: str) -> None:
    with pytest.raises(UnsupportedVersionError) as error:
        version.check_version(other)
    assert str(error.value) == (
        f"DeepSpeed {other} is not supported: at least 0.19.8 and below 0.20.0 is needed; "
        "pip install 'deepspeed>=0.19.8,<0.20.0'"
    )
    assert isinstance(error.value, ImportError)  # what `except ImportError` around an optional import expects


def test_the_range_is_what_the_package_asks_for() -> None:
    assert '"deepspeed>=0.19.8,<0.20"' in (ROOT / "pyproject.toml").read_text()


def test_an_engine_whose_internals_are_others() -> None:
    with pytest.raises(UnsupportedVersionError, match=r"below 0\.20\.0 is needed \(dict lacks a, b\)"):
        engine.check_internals({}, {"a": "", "keys": "", "b": ""})


def test_one_that_breaks_on_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> Any:
        raise AttributeError("module 'torch' has no attribute 'x'\nand more")

    monkeypatch.setattr(version, "_imported", broken)
    with pytest.raises(UserError, match=r"^DeepSpeed cannot be imported \(module 'torch' has no attribute 'x'\); "):
        version.import_deepspeed(CPU)


def test_one_on_another_device_than_the_run() -> None:
    with pytest.raises(UserError, match=r"^DeepSpeed computes on cpu, this run on cuda; leave DS_ACCELERATOR unset"):
        version.import_deepspeed(torch.device("cuda", 0))


def test_it_is_told_the_device_of_the_run_and_nobody_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take a GPU that it sees although the CPU was asked for."""
    told = []
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    decide = deepspeed.get_accelerator

    def seen() -> Any:
        told.append(os.environ.get("DS_ACCELERATOR"))
        return decide()

    monkeypatch.setattr(deepspeed, "get_accelerator", seen)
    assert version.import_deepspeed(CPU) is deepspeed
    assert told[0] == "cpu"
    assert "DS_ACCELERATOR" not in os.environ
