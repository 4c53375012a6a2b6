"""Where a process computes: what is chosen for it, what it may ask for, what is refused, on machines with GPUs or not.

Stand-ins say how many GPUs torch sees and which device files there are; no GPU is needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from ssam_scale.errors import UserError
from ssam_scale.sharding import join_world
from ssam_scale.sharding.device import choose_device
from tests.support.machine import Machine

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def refusal(asked: str = "auto") -> str:
    with pytest.raises(UserError) as error:
        choose_device(asked)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("build", ["12.8", None])
def test_without_a_gpu_it_is_the_cpu(machine: Machine, build: str | None) -> None:
    machine.has(gpus=0, seen=0, cuda=build, why="Found no NVIDIA driver on your system")
    assert choose_device() == choose_device("cpu") == CPU


@pytest.mark.parametrize(("gpus", "rank"), [(1, 0), (8, 0), (8, 7)])
def test_each_process_has_the_gpu_of_its_number(machine: Machine, gpus: int, rank: int) -> None:
    machine.has(gpus=gpus, seen=gpus)
    machine.says(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(gpus))
    assert choose_device() == choose_device("cuda") == torch.device("cuda", rank)
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_a_process_alone_joins_with_its_device(machine: Machine, gpus: int) -> None:
    machine.has(gpus=gpus, seen=gpus)
    with join_world() as world:
        assert world.device == (torch.device("cuda", 0) if gpus else CPU)
    assert machine.set_devices == ([world.device] if gpus else [])
    with join_world(device="cpu") as world:
        assert world.device == CPU
    assert len(machine.set_devices) == min(gpus, 1)


ON_A_GPU_MACHINE = {
    "a CPU build": (
        {"cuda": None},
        {},
        r"torch \S+ is a build for the CPU; install one for CUDA \(.*\)",
    ),
    "an old driver": (
        {"why": "The NVIDIA driver on your system is too old (found version 11040).\nPlease update"},
        {},
        r"torch \S+ cannot use it \(The NVIDIA driver on your system is too old \(found version 11040\)\); mend the .*",
    ),
    "a number that no GPU has": (
        {"why": "No CUDA GPUs are available"},
        {"CUDA_VISIBLE_DEVICES": "9"},
        r"torch \S+ cannot use it \(No CUDA GPUs are available, with CUDA_VISIBLE_DEVICES=9\); .*",
    ),
}


@pytest.mark.parametrize(("found", "environment", "message"), ON_A_GPU_MACHINE.values(), ids=ON_A_GPU_MACHINE)
def test_a_gpu_that_torch_cannot_use_is_not_passed_over(
    machine: Machine, found: dict[str, str | None], environment: Mapping[str, str], message: str
) -> None:
    machine.has(gpus=8, seen=0, **found)
    machine.says(**environment)
    way_out = "; or ask for the CPU: train.device=cpu"
    assert re.fullmatch(rf"this machine has 8 NVIDIA GPUs \(.*/nvidia0\), but {message}{way_out}", refusal())
    assert re.fullmatch(rf"a GPU was asked for \(train\.device=cuda\), but {message}{way_out}", refusal("cuda"))
    assert choose_device("cpu") == CPU


def test_gpus_that_slurm_gave_and_torch_cannot_use(machine: Machine) -> None:
    machine.has(gpus=0, seen=0, cuda=None)
    machine.says(SLURM_GPUS_ON_NODE="4")
    assert "Slurm has given this job GPUs (SLURM_GPUS_ON_NODE=4), but torch" in refusal()
    machine.says(SLURM_GPUS_ON_NODE="0")
    assert choose_device() == CPU
    machine.says(SLURM_JOB_GPUS="0")  # not how many, but which
    assert "Slurm has given this job GPUs (SLURM_JOB_GPUS=0), but torch" in refusal()


@pytest.mark.parametrize("environment", [{"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}])
def test_hiding_all_gpus_asks_for_the_cpu(machine: Machine, environment: Mapping[str, str]) -> None:
    machine.has(gpus=8, seen=0, cuda=None)
    machine.says(**environment)
    assert choose_device() == CPU
    machine.has(gpus=8, seen=0, why="No CUDA GPUs are available")
    assert choose_device() == CPU
    assert f"CUDA_VISIBLE_DEVICES={environment['CUDA_VISIBLE_DEVICES']} hides all GPUs; unset it" in refusal("cuda")


def test_deepspeeds_way_to_ask_for_the_cpu(machine: Machine) -> None:
    machine.has(gpus=8, seen=8)
    machine.says(DS_ACCELERATOR="cpu")
    assert choose_device() == CPU
    assert refusal("cuda") == (
        "a GPU was asked for (train.device=cuda) and the CPU too (DS_ACCELERATOR=cpu); drop one of them"
    )


def test_what_deepspeeds_launcher_sets_is_no_sign_of_a_gpu(machine: Machine) -> None:
    machine.says(CUDA_VISIBLE_DEVICES="0,1", LOCAL_SIZE="2", LOCAL_RANK="1")
    assert choose_device() == CPU


def test_a_gpu_where_there_is_none(machine: Machine) -> None:
    machine.has(gpus=0, seen=0, why="Found no NVIDIA driver on your system. Please check\nthat you have one")
    assert re.fullmatch(
        r"a GPU was asked for \(train\.device=cuda\), but torch \S+ finds none here \(Found no NVIDIA driver on your "
        r"system\. Please check\); use a machine that has one; or ask for the CPU: train\.device=cpu",
        refusal("cuda"),
    )
    machine.has(gpus=0, seen=0, cuda=None)
    assert "is a build for the CPU; install" in refusal("cuda")


@pytest.mark.parametrize(
    ("gpus", "environment", "message"),
    [
        (
            1,
            {"LOCAL_WORLD_SIZE": "2"},
            "2 processes were started on this machine, and it has 1 GPU; start no more than 1 ",
        ),
        (8, {"LOCAL_WORLD_SIZE": "9", "LOCAL_RANK": "3"}, "9 processes .* it has 8 GPUs; .*--nproc_per_node 8"),
        (8, {"LOCAL_SIZE": "16"}, "16 processes"),
        (4, {"LOCAL_RANK": "6"}, "7 processes"),
        (
            2,
            {"LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "0,3"},
            "4 processes .* 2 GPUs that CUDA_VISIBLE_DEVICES=0,3 lets it see; .*train.device=cpu",
        ),
    ],
)
def test_more_processes_than_gpus_are_refused_by_each_of_them(
    machine: Machine, gpus: int, environment: Mapping[str, str], message: str
) -> None:
    machine.has(gpus=gpus, seen=gpus)
    machine.says(**environment)
    assert re.search(message, refusal())
    assert refusal("cuda") == refusal()
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize(
    ("said", "harmless"),
    [
        *((n, "1") for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")),
        *((n, "1") for n in ("FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE", "HOROVOD_SIZE")),
        *((n, "0") for n in ("PMIX_RANK", "ALPS_APP_PE", "PALS_RANKID")),
    ],
)
def test_processes_that_know_nothing_of_each_other(said: str, harmless: str, machine: Machine) -> None:
    """As of srun, of several kinds of mpirun, of flux, jsrun, horovodrun, aprun and PALS."""
    machine.says(**{said: "2"})
    with pytest.raises(UserError, match=f"{said} is 2 but RANK is not set"), join_world():
        pass
    machine.says(**{said: harmless})
    with join_world(device="cpu") as world:
        assert world.size == 1


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE, MASTER_ADDR, MASTER_PORT not, .* or unset RANK"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h"}, "RANK is set and MASTER_PORT not"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x', and a whole number is needed; start them with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is '', and a whole number"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK is 3 and WORLD_SIZE 2, of which ranks are 0 to 1"),
    ],
)
def test_variables_that_were_set_by_halves(said: dict[str, str], told: str, machine: Machine) -> None:
    """As by `export RANK=0`, or by a script that sets them itself."""
    machine.says(**said)
    with pytest.raises(UserError, match=told), join_world(device="cpu"):
        pass


def test_the_harness_hides_gpus() -> None:
    """Else the tests of two processes would crawl onto one GPU."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
