"""The harness of the tests: what they see of GPUs, ranks that serve many tests, tiers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ssam_scale.sharding import World, bucketed_all_reduce
from tests.support.gpus import selects_gpu_tests_only
from tests.support.pretended_gpu.reports import MARK, reports_of
from tests.support.processes import run
from tests.support.ranks import RankError, run_ranks
from tests.support.tiers import few
from tests.support.workers import APART, WAITING

TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node=2"]
PHASES = ("setup", "call", "teardown")
SAY = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"


@pytest.mark.parametrize(
    ("expression", "only"),
    [
        ("gpu", True),
        ("gpu and not slow", True),
        ("gpu and (slow or exhaustive)", True),
        ("", False),
        ("not slow", False),
        ("not gpu", False),
        ("gpu or exhaustive", False),
        ("slow", False),
    ],
)
def test_gpus_are_seen_where_no_other_test_could_run(expression: str, only: bool) -> None:
    assert selects_gpu_tests_only(expression) == only


def test_a_child_sees_no_gpu_whatever_its_parent_lets_it_see() -> None:
    """DeepSpeed's launcher lets every process see one GPU each, as here."""
    for seen in ({}, {"CUDA_VISIBLE_DEVICES": "0,1"}):
        done = subprocess.run(
            [sys.executable, "-c", SAY], env={**os.environ, **seen}, capture_output=True, text=True, check=True
        )
        assert done.stdout == "''\n"


def test_a_script_is_told_of_no_gpu() -> None:
    assert shutil.which("nvidia-smi")
    assert subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    few([TORCHRUN, ["deepspeed", "--num_gpus=2"]], TORCHRUN),
    ids=lambda words: words[0],
)
def test_no_process_of_a_launcher_sees_a_gpu(launcher: list[str], tmp_path: Path) -> None:
    # To a file of its own: what two processes print at once may share a line.
    (tmp_path / "say.py").write_text(
        "import os, pathlib\n"
        "seen = repr(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "pathlib.Path(__file__).with_name('rank' + os.environ['RANK']).write_text(seen)\n"
    )
    program = Path(sys.executable).parent / launcher[0]
    done = run([program, *launcher[1:], tmp_path / "say.py"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["''", "''"]


@pytest.mark.slow
@pytest.mark.parametrize(("expression", "seen"), [("gpu", "7"), ("gpu or slow", "")])
def test_what_a_run_of_pytest_sees(expression: str, seen: str, tmp_path: Path) -> None:
    tests = Path(__file__).parent
    file = tmp_path / "test_it.py"
    file.write_text(
        "import os, pytest\n@pytest.mark.gpu\n@pytest.mark.slow\ndef test_it(): pass\n"
        f"assert os.environ['CUDA_VISIBLE_DEVICES'] == {seen!r}\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.conftest"]
    visible = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    visible |= {"CUDA_VISIBLE_DEVICES": "7", "PYTHONPATH": str(tests.parent)}
    done = subprocess.run(
        [*command, f"--rootdir={tests.parent}", f"-c={tests.parent / 'pyproject.toml'}", "-m", expression, str(file)],
        env=visible,
        capture_output=True,
        text=True,
    )
    reason = "needs a CUDA device" if seen else "run these by themselves: pytest -m gpu"
    assert done.returncode == 0, done.stdout + done.stderr
    assert reason in done.stdout


@pytest.mark.parametrize("then", ["import os; os.abort()", "import time; time.sleep(1000)"], ids=["dies", "is silent"])
def test_what_a_pretending_process_ends_without_is_reported_as_failed(
    then: str, request: pytest.FixtureRequest
) -> None:
    """Raised from a hook it would have ended the worker, and the run with it."""
    items = [request.node, pytest.Function.from_parent(request.node.parent, name="test_other", callobj=lambda: None)]
    passed = [pytest.TestReport(items[0].nodeid, items[0].location, {}, "passed", None, when) for when in PHASES]
    hook = request.config.hook
    lines = [MARK + json.dumps(hook.pytest_report_to_serializable(config=request.config, report=one)) for one in passed]
    said = "print('what was said', flush=True); " + "; ".join(f"print({line!r}, flush=True)" for line in lines)
    reports = reports_of([sys.executable, "-IS", "-c", f"{said}; {then}"], items, silence=5)
    assert [(one.when, one.outcome) for one in reports[items[0].nodeid]] == [(when, "passed") for when in PHASES]
    (missing,) = reports[items[1].nodeid]
    assert missing.failed
    assert "before or in this test" in missing.longreprtext
    assert "what was said" in missing.longreprtext


@pytest.mark.exhaustive
def test_the_last_of_three_workers_takes_what_waits_and_the_others_all_else(tmp_path: Path) -> None:
    """Also where nothing else is left."""
    (tmp_path / "tests" / "launch").mkdir(parents=True)
    (tmp_path / "conftest.py").write_text(
        "from tests.support import workers\n"
        "def pytest_xdist_make_scheduler(config, log):\n    return workers.scheduling(config, log)\n"
    )
    files = ["tests/launch/test_slurm.py", *(f"tests/test_{letter}.py" for letter in "abcdef")]
    test = "import os, time, pytest\n@pytest.mark.parametrize('n', range(3))\n"
    test += "def test_it(n):\n    time.sleep(0.2)\n    print('ran on', os.environ['PYTEST_XDIST_WORKER'])\n"
    for file in files:
        (tmp_path / file).write_text(test)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "3", "-rP", "--rootdir", str(tmp_path)]
    env = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    for asked, by_the_last in ((files, 3), (files[:1], None)):
        done = run([*command, "-c", os.devnull, *asked], cwd=tmp_path, env=env)
        assert f"{3 * len(asked)} passed" in done.stdout, done.stdout
        assert by_the_last in (None, done.stdout.count("ran on gw2")), done.stdout


def test_files_that_workers_share_out_are_there_and_have_no_fixture_for_several_tests() -> None:
    root = Path(__file__).parents[1]
    assert all((root / file).exists() for file in WAITING)
    for file in APART:
        assert 'scope="module"' not in (root / file).read_text(), file


def pid(world: World) -> tuple[int, str, bool]:
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.is_available()


def breaks(world: World, rank: int) -> None:
    if world.rank == rank:
        raise ValueError("on purpose")
    dist.barrier()


def exits(world: World) -> None:
    if world.rank == 1:
        os._exit(7)


def patches(world: World) -> None:
    bucketed_all_reduce._BUCKET_BYTES += 1


def draws(world: World) -> torch.Tensor:
    os.environ["LEFT_BY_A_TEST"] = "1"
    torch.set_default_dtype(torch.float64)
    return torch.rand(3)


def is_clean(world: World) -> bool:
    return "LEFT_BY_A_TEST" not in os.environ and torch.get_default_dtype() == torch.float32


def test_ranks_stay_see_no_gpu_and_start_each_job_alike() -> None:
    first = run_ranks(2, pid)
    assert len({process for process, *_ in first}) == 2
    assert [seen for _, *seen in first] == [["", False]] * 2
    assert torch.equal(run_ranks(2, draws)[0], run_ranks(2, draws)[1])
    assert run_ranks(2, is_clean) == [True, True]
    assert run_ranks(2, pid) == first


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        (breaks, (1,), "rank 1 of 2: Traceback.*ValueError: on purpose"),
        (exits, (), "rank 1 of 2: ended with exit code 7"),
        (patches, (), "patches leaves ssam_scale.sharding.bucketed_all_reduce._BUCKET_BYTES changed"),
    ],
)
def test_a_failure_on_a_rank_is_told_and_the_next_job_gets_new_ranks(function: Any, args: Any, message: str) -> None:
    before = run_ranks(2, pid)
    with pytest.raises(RankError, match=f"(?s){message}"):
        run_ranks(2, function, *args)
    after = run_ranks(2, pid)
    assert not {process for process, *_ in before} & {process for process, *_ in after}
