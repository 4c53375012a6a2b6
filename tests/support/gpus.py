"""Which tests see GPUs: those marked `gpu`, in a run of their own (`pytest -m gpu`).

No other test does, and no process that it starts.

A process sees the same GPUs from its first look at them to its end, and its children see what it sees. So it is the run
that sees them or not, and not the test. Without this, two ranks on a machine with one GPU would crawl onto it and fail.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from _pytest.mark.expression import Expression

_OTHER_MARKS = ("slow", "exhaustive")
_WITHOUT = Path(__file__).parent / "without_gpus"


def selects_gpu_tests_only(expression: str) -> bool:
    """Whether `pytest -m expression` leaves out every test that is not marked `gpu`."""
    if not expression.strip():
        return False
    selects = Expression.compile(expression).evaluate
    for chosen in itertools.product((False, True), repeat=len(_OTHER_MARKS)):
        marks = {mark for mark, is_there in zip(_OTHER_MARKS, chosen, strict=True) if is_there}
        if selects(lambda name, marks=marks, **_: name in marks):
            return False
    return True


def hide_gpus() -> None:
    """For this process, which must not have looked for them yet, and all that it will start."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # read as Triton is imported
    for variable in ("PYTHONPATH", "PATH"):  # a sitecustomize for Python, an nvidia-smi for scripts
        path = [str(_WITHOUT), *filter(None, os.environ.get(variable, "").split(os.pathsep))]
        os.environ[variable] = os.pathsep.join(dict.fromkeys(path))


def are_hidden() -> bool:
    """Whether `hide_gpus` was called, here or in the process that started this one."""
    return str(_WITHOUT) in os.environ.get("PYTHONPATH", "").split(os.pathsep)
