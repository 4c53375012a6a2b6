"""Whether `torch.compile` makes code for a device here: found out before anything is built."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ssam_scale.errors import UserError


def check_compiler(device: torch.device, option: str = "train.compile=true") -> None:
    """Compile a small function and run it.

    Args:
        device: where compiled code is to run.
        option: what asked for it, in the words of the error.

    Raises:
        UserError: that does not work; names the reason and what it needs.
    """
    try:
        if device.type == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()  # what is compiled already, and kept on disk, would need none
        elif importlib.util.find_spec("triton") is None:
            raise ImportError("Triton is not installed")
        compiled = torch.compile(_work, dynamic=False)
        compiled(torch.ones(8, device=device))
    except Exception as error:  # of as many kinds as there are compilers
        said: BaseException = getattr(error, "inner_exception", error)  # dynamo's own says who raised it, and no more
        reason = next(iter(str(said).strip().splitlines()), "") or type(said).__name__
        raise UserError(
            f"{option}: torch.compile makes no code for {device.type} here ({reason}); it needs {_NEEDS[device.type]}"
        ) from error


_NEEDS = {
    "cpu": "a C++ compiler (g++, or what CXX names) and Python's headers",
    "cuda": "Triton, a C compiler, Python's headers and a GPU of compute capability 7.0 or newer",
}


def _work(x: Tensor) -> Tensor:
    return x.sin() + 1.0
