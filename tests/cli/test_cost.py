"""`ssam-scale cost`, run as its users run it, on a small network."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from ssam_scale.cli.main import main
from ssam_scale.costs.compute import StageTimes, StepTimes, base_seconds

CONFIG = """
model: {name: test_vit, num_classes: 10}
data: {train: missing.beton, val: missing.beton, batch_size: 256, resolution: 32, eval_resolution: 32}
optimizer: {name: adamw, lr: 1.0e-3}
perturbation: {rho: 0.1, mask: {pattern: depth, policy: rotate}}
train: {epochs: 2}
"""
ELEMENT = "perturbation.mask={pattern: element}"
CUT = "perturbation.mask.cut=[0.5, 0.5]"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("cost")
    (path / "run.yaml").write_text(CONFIG)
    return path


def run(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[Row]:
    """The rows of a command that succeeds; no data is there, so none is read."""
    with pytest.raises(SystemExit) as ended:
        main(["cost", "--config", str(folder / "run.yaml"), "--json", *arguments])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    rows: list[Row] = json.loads(said.out)
    return rows


@pytest.fixture
def times(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = folder / "times.json"
    if not path.exists():
        run(folder, capsys, "--gpus", "1", "--images", "4", "--repeats", "1", "--save-times", str(path))
    return path


def test_times_measured_once_serve_every_question(
    folder: Path, times: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = json.loads(times.read_text())["times"]
    assert [each["images"] for each in saved["passes"]] == [2, 4]
    stages = tuple(StageTimes(**stage) for stage in saved["passes"][-1]["stages"])
    expected = base_seconds(StepTimes.proportional(stages, saved["optimizer"], saved["perturb"]))
    rows = run(folder, capsys, "--times", str(times), "--gpus", "1", "--gpus", "64")
    by = {(row["gpus"], row["plan"]): row for row in rows}
    assert list(by) == [(gpus, plan) for gpus in (1, 64) for plan in ("base", "sam", "ssam-depth")]
    assert by[1, "base"]["seconds"] == pytest.approx(expected)
    assert by[1, "base"]["bytes"] == 0.0
    for gpus in (1, 64):
        base, sam, ours = (by[gpus, plan] for plan in ("base", "sam", "ssam-depth"))
        assert base["seconds"] < ours["seconds"] < sam["seconds"] <= sam["seconds_unhidden"]
        assert base["memory_perturbing"] == 0.0
        assert base["memory_total"] < ours["memory_total"] <= sam["memory_total"]
        assert (base["density"], sam["density"]) == (0.0, 1.0)
        # AdamW keeps two numbers a weight.
        assert base["memory_optimizer"] == 2 * base["memory_weights"]
        # A checkpoint has all of both, however they are shared out.
        assert base["memory_copy"] == 3 * by[1, "base"]["memory_weights"]
    assert by[64, "ssam-depth"]["bytes"] < by[64, "sam"]["bytes"] == 2 * by[64, "base"]["bytes"]


def by_hand(folder: Path, times: Path, seconds: dict[int, float]) -> Path:
    """The file with the same times for every stage: the seconds of a forward, by images of the pass."""
    found = json.loads(times.read_text())
    count = len(found["times"]["passes"][0]["stages"])
    parts = {"forward": 1.0, "backward": 2.0, "no_weights": 1.0, "no_input": 1.0}
    found["times"]["passes"] = [
        {"images": images, "stages": [{name: each * part for name, part in parts.items()}] * count}
        for images, each in seconds.items()
    ]
    found["times"]["images"] = max(seconds)
    path = folder / "by_hand.json"
    path.write_text(json.dumps(found))
    return path


def test_an_ascent_on_part_of_the_batch_takes_the_time_of_its_images(
    folder: Path, times: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A forward of 64 images takes 16 times that of two, and one of 16 twice."""
    path = by_hand(folder, times, {2: 1.0, 16: 2.0, 64: 16.0})

    def of(*overrides: str) -> tuple[float, float]:
        dense = ["perturbation.mask=null", *overrides]
        rows = run(folder, capsys, "--times", str(path), "--gpus", "1", *dense)
        return rows[-1]["seconds"] - rows[0]["seconds"], rows[-1]["ascent_images"]

    perturb = json.loads(path.read_text())["times"]["perturb"] * json.loads(path.read_text())["weights"]
    whole, images = of()
    assert images == 64
    for share, seen, seconds in (
        (0.25, 16, 2.0),
        (0.03125, 2, 1.0),
        (0.140625, 9, 1.5),  # between two that were measured
        (0.015625, 1, 1.0),  # fewer than were ever measured
    ):
        extra, images = of(f"perturbation.direction.fraction={share}")
        assert images == seen
        assert (extra - perturb) / (whole - perturb) == pytest.approx(seconds / 16.0)
    # Each of two micro-batches of 64 climbs by two images.
    extra, images = of("perturbation.direction.fraction=0.03125", "train.accumulation=2")
    assert images == 2
    assert (extra - perturb) / (whole - perturb) == pytest.approx(2 / 16.0)
    with pytest.raises(SystemExit):
        main(
            ["cost", "--config", str(folder / "run.yaml"), "--times", str(path), "perturbation.direction.fraction=0.01"]
        )
    said = " ".join(capsys.readouterr().out.split())
    assert "measured with 2, 16, 64 images" in said
    assert "Passes of fewer than 2 images are taken to last as long as those of 2" in said


def test_steps_without_an_ascent_cost_less(folder: Path, times: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def extra(*overrides: str) -> float:
        rows = run(folder, capsys, "--times", str(times), "--gpus", "1", *overrides)
        return float(rows[-1]["seconds"] - rows[0]["seconds"])

    every = extra()
    assert extra("perturbation.interval=4") == pytest.approx(every / 4)
    assert extra("perturbation.window=[0.75, 1.0]") == pytest.approx(every / 4)
    assert every < extra("perturbation.norm=calibrated", "perturbation.calibrate_every=2")
    # Several micro-batches run the prefix again, and perturb once.
    saved = json.loads(times.read_text())
    perturb = saved["times"]["perturb"] * saved["weights"]
    assert extra("train.accumulation=2") > 2 * (every - perturb)


def test_what_is_kept_between_ascents_takes_memory_and_a_little_time(
    folder: Path, times: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def of(*overrides: str) -> Row:
        given = ["--times", str(times), "--gpus", "8", "perturbation.interval=5", "perturbation.mask=null"]
        return run(folder, capsys, *given, *overrides)[-1]

    plain, reusing = of(), of("perturbation.reuse=0.7")
    assert plain["memory_reuse"] == 0.0
    # What the last ascent left, and what the next one is by.
    assert reusing["memory_reuse"] == 2 * reusing["memory_weights"]
    assert plain["seconds"] < reusing["seconds"]
    assert plain["bytes"] == reusing["bytes"]
    # GSAM has ε until the descent's gradients are there.
    gap = of("perturbation.gap=0.3")
    assert gap["memory_reuse"] == gap["memory_weights"]
    assert gap["bytes"] == plain["bytes"]


@pytest.mark.parametrize(("backend", "processes"), [("ddp", 1), ("fsdp2", 8), ("zero2", 8)])
def test_averages_lie_where_the_weights_are_stepped(
    folder: Path, times: Path, capsys: pytest.CaptureFixture[str], backend: str, processes: int
) -> None:
    def of(*overrides: str) -> list[Row]:
        given = ["--times", str(times), "--gpus", "8", f"sharding.backend={backend}"]
        return run(folder, capsys, *given, *overrides)

    plain, averaged, mesa = of(), of("train.ema_decay=0.9"), of("trajectory={kind: mesa, start_epoch: 1}")
    weights = plain[0]["memory_copy"] / 3
    assert {row["memory_averages"] for row in plain} == {0.0}
    for row in averaged:
        # AdamW's two numbers lie there too; FSDP2 and ZeRO pad their shards.
        assert row["memory_averages"] == row["memory_optimizer"] / 2
        assert weights / processes <= row["memory_averages"] < 1.5 * weights / processes
        assert row["memory_copy"] == 4 * weights
    # Only the configured plan has MESA's.
    assert [row["memory_averages"] for row in mesa] == [0.0, 0.0, averaged[0]["memory_averages"]]
    assert mesa[-1]["memory_total"] == plain[-1]["memory_total"] + averaged[0]["memory_averages"]


FSDP2 = ["sharding.backend=fsdp2"]
TENSOR, BLOCK, CUT = (f"perturbation.mask={{pattern: {pattern}}}" for pattern in ("tensor", "block", "depth"))


@pytest.mark.parametrize(
    ("lever", "plan", "more", "less"),
    [
        ("savings.elide=false", [TENSOR, "sharding.backend=ddp"], ["seconds"], []),
        ("savings.elide=false", [TENSOR, *FSDP2], ["seconds"], []),
        ("savings.elide=false", [TENSOR, "sharding.backend=zero2"], ["seconds"], []),
        ("savings.elide=false", [TENSOR, "sharding.backend=zero3"], ["seconds"], []),
        ("savings.share_prefix=false", [CUT, *FSDP2], ["seconds", "bytes"], []),
        ("savings.pack=false", [ELEMENT, "sharding.backend=ddp"], ["bytes"], []),
        ("savings.pack=false", [ELEMENT, *FSDP2], ["bytes"], []),
        ("savings.pack=false", [ELEMENT, "sharding.backend=zero1"], ["bytes"], []),
        ("savings.pack=false", [ELEMENT, "sharding.backend=zero3"], ["bytes"], []),
        ("savings.keep_gathered=true", [BLOCK, *FSDP2], ["memory_gathered"], ["bytes"]),
        ("direction.scope=shard_group", [TENSOR, *FSDP2, "sharding.replicas=2"], [], ["bytes", "seconds_unhidden"]),
        ("direction.scope=worker", [TENSOR, "sharding.backend=ddp"], [], ["bytes", "seconds_unhidden"]),
        ("direction.scope=worker", [TENSOR, "sharding.backend=zero2"], [], ["bytes", "seconds_unhidden"]),
        ("direction={source: momentum}", [TENSOR, *FSDP2], [], ["bytes", "seconds"]),
        ("direction={source: friendly}", [TENSOR, "sharding.backend=zero1"], ["bytes"], []),
    ],
)
def test_a_lever_changes_what_it_is_for(
    lever: str,
    plan: list[str],
    more: list[str],
    less: list[str],
    folder: Path,
    times: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Times by hand: the smallest network's are too short for their differences to be more than noise.
    given = ["--times", str(by_hand(folder, times, {4: 1.0})), "--gpus", "16", *plan]
    (*_, usual), (*_, other) = (
        run(folder, capsys, *given, *overrides) for overrides in ([], [f"perturbation.{lever}"])
    )
    for what in more:
        assert other[what] > usual[what], what
    for what in less:
        assert other[what] < usual[what], what
    for what in {"seconds", "bytes"} - {*more, *less}:
        assert other[what] == pytest.approx(usual[what]), what


def test_a_shared_batch_gets_smaller_with_every_gpu(
    folder: Path, times: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(folder, capsys, "--times", str(times), "--scaling", "strong", "--gpus", "8", "--gpus", "64")
    assert [row["images"] for row in rows] == [32.0] * 3 + [4.0] * 3
    assert rows[3]["seconds"] < rows[0]["seconds"]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "backend",
    ["ddp", "fsdp2", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("zero1", "zero3"))],
)
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(CUT, marks=pytest.mark.exhaustive),
        pytest.param("perturbation.mask={pattern: tensor}", marks=pytest.mark.exhaustive),
        "perturbation.norm=calibrated",
    ],
)
def test_one_process_of_512_sends_and_holds_what_is_predicted(
    plan: str, backend: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(folder, capsys, "--dry-run", "--gpus", "512", f"sharding.backend={backend}", plan)
    assert rows[0]["plan"] == "base"
    assert rows[1]["mask"] == ("by random scores" if "tensor" in plan else "as configured")
    for row in rows:
        assert row["gpus"] == 512
        # The model leaves out sums of norms; what is held besides are numbers by the row.
        assert row["predicted_sent"] == pytest.approx(row["sent"], rel=0.01)
        assert row["predicted_held"] == pytest.approx(row["held"], rel=0.01)
    assert rows[0]["sent"] < rows[1]["sent"] <= 2.01 * rows[0]["sent"]


FREEZE = "model.freeze=[{parameters: '%s'}]"
# An embedding and what follows it, norms everywhere, one block in between, and all but the head.
FROZEN = [r"^(patch_embed|cls_token|pos_embed|blocks\.[0-2]\.)", "norm", r"^blocks\.3\.", "^(?!head)"]


# In the slow tier each of what is frozen once, on a backend that holds all weights and on two that shard them.
ONCE = [("ddp", "norm", CUT), ("fsdp2", FROZEN[2], ELEMENT), ("zero3", FROZEN[0], CUT), ("ddp", FROZEN[3], ELEMENT)]
EACH = itertools.product(("ddp", "fsdp2", "zero2", "zero3"), FROZEN, (CUT, ELEMENT))


@pytest.mark.parametrize(
    ("backend", "frozen", "plan"),
    [
        *(pytest.param(*case, marks=SLOW) for case in ONCE),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in EACH if case not in ONCE),
    ],
)
def test_with_frozen_weights_one_process_sends_and_holds_what_is_predicted(
    backend: str, frozen: str, plan: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(folder, capsys, "--dry-run", "--gpus", "8", f"sharding.backend={backend}", FREEZE % frozen, plan)
    every = run(folder, capsys, "--dry-run", "--gpus", "8", f"sharding.backend={backend}", plan)
    for row, whole in zip(rows, every, strict=True):
        assert row["predicted_held"] == pytest.approx(row["held"], rel=0.01)
        assert row["predicted_held"] < whole["predicted_held"]
        assert row["predicted_sent"] < whole["predicted_sent"]
        assert row["predicted_sent"] == pytest.approx(row["sent"], rel=0.01)


def test_what_is_frozen_at_first_costs_less_for_as_long(
    folder: Path, times: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def predicted(*arguments: str) -> list[Row]:
        how = ["train.epochs=4", "--times", str(times), "--gpus", "1", "--gpus", "8", "perturbation.window=[0.5, 1.0]"]
        return run(folder, capsys, *how, *arguments)

    at_first = "model.freeze=[{parameters: '^(?!head)', until_epoch: 3}]"
    whole, frozen, some = predicted(), predicted(FREEZE % "^(?!head)"), predicted(at_first)
    for of_all, of_head, mean in zip(whole, frozen, some, strict=True):
        for key in ("seconds", "bytes"):
            assert of_head[key] <= mean[key] <= of_all[key]
            if mean["plan"] != "ssam-depth":  # whose ascents are all in the second half
                assert mean[key] == pytest.approx(0.25 * of_all[key] + 0.75 * of_head[key])
        assert mean["memory_total"] == of_all["memory_total"] > of_head["memory_total"]
        assert of_head["memory_gradients"] < 0.1 * of_all["memory_gradients"]
    (base, _, ours), (whole_base, _, whole_ours) = some[:3], whole[:3]
    ascents = whole_ours["seconds"] - whole_base["seconds"]  # in half of the steps of the whole network
    assert ours["seconds"] - base["seconds"] < 0.8 * ascents


@pytest.mark.slow
def test_in_bf16_one_process_of_eight_gathers_half_as_predicted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--dry-run", "--gpus", "8", "sharding.backend=fsdp2", "perturbation.mask.cut=[0.5, 0.5]"]
    float32, bf16 = (run(folder, capsys, *how, f"train.precision={name}") for name in ("fp32", "bf16"))
    for row, other in zip(bf16, float32, strict=True):
        assert row["predicted_sent"] == pytest.approx(row["sent"], rel=0.01)
        assert row["predicted_held"] == pytest.approx(row["held"], rel=0.01)
        assert row["held"] == other["held"]
        gathered, whole = (each["sent_by_collective"]["all_gather"] for each in (row, other))
        assert 0.5 < gathered / whole < 0.57  # norms and biases stay float32


@pytest.mark.slow
def test_copies_and_micro_batches_of_a_dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["sharding.backend=fsdp2", "sharding.replicas=8", "train.accumulation=2", ELEMENT]
    rows = run(folder, capsys, "--dry-run", "--gpus", "64", *how)
    for row in rows:
        assert row["replicas"] == 8
        assert row["predicted_sent"] == pytest.approx(row["sent"], rel=0.01)
        assert row["predicted_held"] == pytest.approx(row["held"], rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus is 0; at least 1 is needed"),
        (["--gpus-per-node", "0"], "--gpus-per-node is 0; at least 1 is needed"),
        (["--network-bandwidth", "-1"], "--network-bandwidth is -1; a positive number of GB/s is needed"),
        (["--scaling", "square"], "--scaling is 'square'; there are weak and strong"),
        (["--images", "3"], "--images is 3; at least 4 are needed"),
        (["--gpus", "12", "sharding.backend=fsdp2", "sharding.replicas=8"], "12 GPUs cannot hold 8 replicas"),
        (["--gpus", "8", "sharding.backend=single"], "backend single on 8 GPUs; use ddp or fsdp2"),
        (
            ["sharding.backend=zero3", "sharding.deepspeed={zero_optimization: {stage3_max_reuse_distance: far}}"],
            'sharding.deepspeed.zero_optimization.stage3_max_reuse_distance: must be a whole number, given "far"',
        ),
        (["--dry-run", "--gpus", "1", "sharding.backend=single"], "--dry-run: backend single sends nothing"),
        (["--times", "nowhere.json"], "--times nowhere.json: No such file or directory"),
        (["--times", "TIMES", "data.resolution=48"], "resolution is 32 there and 48 in the configuration"),
        (["--times", "TIMES", "--scaling", "strong", "--gpus", "512"], "gives each GPU less than one image"),
        (
            ["--times", "old.json"],
            "--times old.json: an older version wrote it, which measured passes of one size only; make a new one with "
            "`ssam-scale cost --config … --save-times old.json`",
        ),
        (["--times", "run.yaml"], "not a file that --save-times wrote"),
        (["model.name=test_vit9"], "knows no model 'test_vit9'"),
    ],
)
def test_mistakes_are_the_users_in_one_line(
    arguments: list[str],
    message: str,
    folder: Path,
    times: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    old = json.loads(times.read_text())
    old["times"] = {"stages": old["times"]["passes"][0]["stages"], "optimizer": 0.1, "perturb": 0.0}
    (folder / "old.json").write_text(json.dumps(old | {"images": 4}))
    given = [str(times) if part == "TIMES" else part for part in arguments]
    with pytest.raises(SystemExit) as ended:
        main(["cost", "--config", "run.yaml", *given])
    said = capsys.readouterr()
    assert ended.value.code == 2, said
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
