"""Which device this process computes on: its own GPU, or the CPU.

Training on the CPU of a machine that has GPUs is hundreds of times slower and looks the same otherwise. So the CPU is
chosen where somebody asks for it, or where nothing speaks for a GPU.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import nn

from ssam_scale.errors import UserError

ModuleT = TypeVar("ModuleT", bound=nn.Module)
DeviceChoice: TypeAlias = Literal["auto", "cuda", "cpu"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What networks compute in, by the names that configurations have for it."""

# One file for each GPU of NVIDIA's that its driver, or a container's runtime, lets processes see.
_DEVICE_FILES = Path("/dev")
# How many GPUs, or which, Slurm has given to a job's share of this machine; and what it says of none.
_SLURM = {"SLURM_GPUS_ON_NODE": ("", "0"), "SLURM_STEP_GPUS": ("",), "SLURM_JOB_GPUS": ("",)}
# What hides all GPUs: nothing, no number of one, and Slurm's word for no device.
_NO_DEVICE = ("", "-1", "NoDevFiles")


def choose_device(asked: DeviceChoice = "auto", *, ask_for_cpu: str = "train.device=cpu") -> torch.device:
    """The device that this process computes on, by its number among the processes of this machine.

    Args:
        asked: cuda: a GPU (ROCm calls its GPUs so too); cpu; auto: a GPU where there is one. The CPU is asked for as
            well by hiding all GPUs (`CUDA_VISIBLE_DEVICES=`) and by `DS_ACCELERATOR=cpu`, DeepSpeed's own way.
        ask_for_cpu: what to tell the user that asks for the CPU.

    Raises:
        UserError: a GPU was asked for and there is none, or there seems to be one that torch cannot use, or there are
            more processes than GPUs.
    """
    if cpu_is_asked_for(asked):
        if asked == "cuda":
            raise UserError(
                "a GPU was asked for (train.device=cuda) and the CPU too (DS_ACCELERATOR=cpu); drop one of them"
            )
        return torch.device("cpu")
    if _cuda_is_available():
        return _own_gpu(ask_for_cpu)
    if asked == "auto":
        if _all_hidden() or (sign := _sign_of_a_gpu()) is None:
            return torch.device("cpu")
        raise UserError(f"{sign}, but {_why_not()}; or ask for the CPU: {ask_for_cpu}")
    raise UserError(f"a GPU was asked for (train.device=cuda), but {_why_not()}; or ask for the CPU: {ask_for_cpu}")


def cpu_is_asked_for(asked: DeviceChoice) -> bool:
    """Whether a process uses no GPU although torch may see some."""
    return asked == "cpu" or os.environ.get("DS_ACCELERATOR") == "cpu"


def use_device(device: torch.device) -> None:
    """Make a device this process's, with torch set as training, benchmarks and predictions have it alike.

    On a GPU: cuDNN measures which of its convolutions is the fastest, since batches are of one size; and products of
    float32 matrices are made of TF32, where there is no autocast, as cuDNN's are by default.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def to_device(module: ModuleT, device: torch.device) -> ModuleT:
    """Move a network to a device, on a GPU in channels_last: convolutions in half precision are only fast so."""
    module.to(device)
    if device.type == "cuda":
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bf16, and does not only pretend to, slower than in fp32. CPUs count as able."""
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def _own_gpu(ask_for_cpu: str) -> torch.device:
    gpus, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    # torchrun says the one, deepspeed the other; without a launcher there is this process.
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    processes = max(int(told), local_rank + 1)
    # Every process says so, not only those that have none: nobody waits for them, and the first one prints it.
    if processes > gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = f" that CUDA_VISIBLE_DEVICES={visible} lets it see" if visible is not None else ""
        raise UserError(
            f"{processes} processes were started on this machine, and it has {gpus} GPU{'s' * (gpus > 1)}{seen}; start "
            f"no more than {gpus} (--nproc_per_node {gpus}), or ask for the CPU: {ask_for_cpu}"
        )
    return torch.device("cuda", local_rank)


def _cuda_is_available() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that does not work: `_why_not` says it
        return torch.cuda.is_available()


def _all_hidden() -> bool:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.strip() in _NO_DEVICE


def _sign_of_a_gpu() -> str | None:
    """What says that this process is meant to have a GPU; None: nothing does.

    Not `CUDA_VISIBLE_DEVICES`, which deepspeed's launcher sets where there is no GPU, too.
    """
    if files := sorted(path.name for path in _DEVICE_FILES.glob("nvidia[0-9]*")):
        return f"this machine has {len(files)} NVIDIA GPU{'s' * (len(files) > 1)} ({_DEVICE_FILES / files[0]})"
    given = [f"{name}={os.environ[name]}" for name, none in _SLURM.items() if os.environ.get(name, "") not in none]
    return f"Slurm has given this job GPUs ({given[0]})" if given else None


def _why_not() -> str:
    """Why torch can use no GPU, and what to do about it."""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is a build for the CPU; install one for CUDA (the same versions of torch and "
            "torchvision, from an index that has them)"
        )
    if _all_hidden():
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides all GPUs; unset it"
    try:
        torch.cuda.init()
        reason = "it sees none"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        reason += f", with CUDA_VISIBLE_DEVICES={visible}"
    if _sign_of_a_gpu() is None:
        return f"torch {torch.__version__} finds none here ({reason}); use a machine that has one"
    return f"torch {torch.__version__} cannot use it ({reason}); mend the driver, or install a torch that goes with it"
