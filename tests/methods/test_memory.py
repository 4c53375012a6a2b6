"""What is remembered of outputs: of which image and epoch, by whom, for how long, and where that does not work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssam_scale.errors import UserError
from ssam_scale.methods import SAF, OutputMemory
from ssam_scale.methods.memory import bytes_per_image, check_room, check_shared
from ssam_scale.methods.saf import epochs_kept
from ssam_scale.sharding import World
from tests.support.ranks import RankError, alone, run_ranks

CLASSES = 3


def logits_of(indices: Any, epoch: int) -> Any:
    """Of each image and epoch others, exactly as float16."""
    return (np.asarray(indices)[:, None] + np.arange(CLASSES) / 8 + 100 * epoch).astype(np.float16)


def written(memory: OutputMemory, epoch: int, *batches: list[int], step: int = 0) -> None:
    memory.begin(epoch, step)
    for batch in batches:
        memory.append(np.array(batch, np.int64), logits_of(batch, epoch))


def test_each_image_comes_back_as_it_was_in_its_epoch(tmp_path: Path) -> None:
    memory = OutputMemory(tmp_path, CLASSES, World())
    for epoch in (4, 5):
        written(memory, epoch, [7, 2, 30000], [3, 0, 9])
        memory.complete()
    for epoch in (4, 5):
        memory.open(epoch)
        found, known = memory.read(np.array([0, 1, 30000, 2, 10**9]))
        assert known.tolist() == [True, False, True, True, False]
        assert (found[known] == logits_of([0, 30000, 2], epoch)).all()
        assert not found[~known].any()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) == 12 * bytes_per_image(CLASSES) == 12 * (2 * CLASSES + 8)


def _shared(world: World, folder: str) -> list[list[float]]:
    memory, results = OutputMemory(Path(folder), CLASSES, world), []
    for epoch in (0, 1):
        mine = [[0, 1, 2], [3, 4]] if (world.rank + epoch) % 2 else [[5, 6], [7]]
        written(memory, epoch, *mine)
        memory.complete()
        memory.open(epoch)
        found, known = memory.read(np.arange(8))
        assert known.all()
        results.append(found[:, 0].tolist())
    return results


def test_every_process_reads_what_any_has_written(tmp_path: Path) -> None:
    expected = [logits_of(range(8), epoch)[:, 0].tolist() for epoch in (0, 1)]
    assert run_ranks(2, _shared, str(tmp_path)) == [expected, expected]


def test_an_epoch_is_gone_on_with_by_another_number_of_processes(tmp_path: Path) -> None:
    """From a step on, past which the ones before had gone, and have left half a row."""
    first = OutputMemory(tmp_path, CLASSES, World())
    written(first, 2, [0, 1], [2, 3])
    state = first.state_dict(0)
    first.flush()
    [path] = tmp_path.rglob("0.logits")
    with path.open("ab") as file:
        file.write(b"x")
    second = OutputMemory(tmp_path, CLASSES, World())
    second.load_state_dict(state)
    second.begin(2, step=1)
    second.append(np.array([3, 2, 4]), logits_of([3, 2, 4], 7))
    second.complete()
    second.open(2)
    found, known = second.read(np.arange(6))
    assert known.tolist() == [True] * 5 + [False]
    assert (found[:2] == logits_of([0, 1], 2)).all()
    assert (found[2:5] == logits_of([2, 3, 4], 7)).all()


@pytest.mark.parametrize(
    "batches", [([1, 2, 1],), ([1, 2], [3, 1]), ([1, 5000], [5000])], ids=["in a batch", "later", "of many"]
)
def test_an_order_that_repeats_an_image_is_one_line(batches: Any, tmp_path: Path) -> None:
    memory = OutputMemory(tmp_path, CLASSES, World())
    with pytest.raises(UserError, match=r"image \d+ comes twice in epoch 3, .*DistributedSampler with drop_last=True"):
        written(memory, 3, *batches)


def _padded(world: World, folder: str) -> None:
    memory = OutputMemory(Path(folder), CLASSES, world)
    written(memory, 0, [2 * world.rank, 2 * world.rank + 1, 8])  # a sampler that fills up
    memory.complete()


def test_so_it_is_where_two_processes_have_the_same_image(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="image 8 comes twice in epoch 0"):
        run_ranks(2, _padded, str(tmp_path))


def _apart(world: World, folder: str) -> None:
    memory = OutputMemory(Path(folder) / str(world.rank), CLASSES, world)
    written(memory, 0, [world.rank])
    memory.complete()


def _checked_apart(world: World, folder: str) -> None:
    own = Path(folder) / str(world.rank)
    own.mkdir()
    check_shared(own / "outputs", world)


def test_a_folder_of_one_machine_only_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        RankError, match=r"outputs of epoch 0 that process . wrote are not in .*, which all processes need"
    ):
        run_ranks(2, _apart, str(tmp_path / "files"))
    # Here the folders lie beside each other, so that each sees the other's.
    assert run_ranks(2, _checked_apart, _made(tmp_path / "seen")) == [None, None]
    assert list((tmp_path / "seen").rglob("*")) == [tmp_path / "seen/0", tmp_path / "seen/1"]


def _made(path: Path) -> str:
    path.mkdir()
    return str(path)


def test_room_on_the_disk_is_looked_for_first(tmp_path: Path) -> None:
    check_room(tmp_path, 100, CLASSES, 4)
    with pytest.raises(
        UserError,
        match=r"is to hold .* GB of outputs \(1,000,000,000,000 images × 1,000 classes × 2 bytes × 5 epochs\)",
    ):
        check_room(tmp_path / "not there", 10**12, 1000, 5)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memory = OutputMemory(tmp_path / "file", CLASSES, World())
    with pytest.raises(UserError, match=r"outputs cannot be written to .*file: "):
        written(memory, 0, [1])


@pytest.mark.parametrize(
    ("lag", "every", "checkpoints", "epochs"),
    [(3, 1, 1, 4), (3, 1, 2, 5), (1, 1, 1, 2), (3, 10, 1, 7), (3, 2, 2, 7), (1, 10, 3, 5)],
)
def test_how_many_epochs_are_kept(lag: int, every: int, checkpoints: int, epochs: int, tmp_path: Path) -> None:
    """As counted beforehand, and as a run has them on its disk."""
    assert epochs_kept(lag, every, checkpoints) == epochs
    saf = SAF(tmp_path, CLASSES, lag_epochs=lag, start_epoch=lag, checkpoints=checkpoints)
    most = 0
    for epoch in range(50):
        trained(saf, epoch, [0, 1, 2])
        most = max(most, len(list(tmp_path.iterdir())))
        saf.end_epoch()
        if (epoch + 1) % every == 0:
            saf.state_dict()
    assert most == epochs


def trained(saf: SAF, epoch: int, order: list[int], step: int = 0) -> list[Any]:
    """Steps of one image each, whose logits tell image and epoch; what the images were held against."""
    saf.begin_epoch(epoch, step)
    seen = []
    for index in order:
        [(_, _, *reference)] = saf.attach([(torch.zeros(1, 1), torch.zeros(1), torch.tensor([index]))])
        if reference:
            then = reference[0].logits
            seen.append(None if then is None or not reference[0].known[0] else float(then[0, 0]))
            saf.loss(torch.tensor([[100.0 * epoch + index, 0.0, 1.0]], requires_grad=True), reference[0])
        saf.after_step()
    return seen


def test_outputs_are_those_of_so_many_epochs_ago_and_come_back_after_a_resumption(tmp_path: Path) -> None:
    first = SAF(tmp_path / "outputs", CLASSES, lag_epochs=2, start_epoch=3, checkpoints=2)
    states = {}
    for epoch in range(5):
        seen = trained(first, epoch, [3, 1, 10 + epoch])
        if epoch == 0:
            assert seen == []  # nothing looks back as far
        elif epoch < 3:
            assert seen == [None] * 3
        else:
            assert seen == [100.0 * (epoch - 2) + 3, 100.0 * (epoch - 2) + 1, None]
        first.end_epoch()
        states[epoch + 1] = first.state_dict()
    for epoch, again in ((5, first), (5, None), (4, None)):
        saf = SAF(tmp_path / "outputs", CLASSES, lag_epochs=2, start_epoch=3, checkpoints=2)
        saf.load_state_dict(states[epoch])
        assert saf.state_dict() == states[epoch]
        assert trained(again or saf, epoch, [1, 3]) == [100.0 * (epoch - 2) + 1, 100.0 * (epoch - 2) + 3]
    moved = SAF(tmp_path / "other", CLASSES, lag_epochs=2, start_epoch=3)  # in another folder: it looks where they were
    moved.load_state_dict(states[5])
    assert trained(moved, 5, [1]) == [301.0]
    moved.end_epoch()
    assert (tmp_path / "outputs/epoch_0003").is_dir()  # another run's


def test_a_state_whose_files_are_gone_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    first = SAF(tmp_path, CLASSES, lag_epochs=1, start_epoch=1)
    trained(first, 0, [0, 1])
    first.end_epoch()
    state = first.state_dict()
    for path in tmp_path.rglob("*.indices"):
        path.unlink()
    second = SAF(tmp_path, CLASSES, lag_epochs=1, start_epoch=1)
    before = second.state_dict()
    with pytest.raises(
        ValueError, match=r"outputs of epoch 0 that process 0 wrote are not in .*checkpoints to go back to"
    ):
        second.load_state_dict(state)
    assert second.state_dict() == before
    with pytest.raises(UserError, match="outputs of epoch 0 are not known"):
        second.begin_epoch(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lag_epochs": 0}, "lag_epochs is 0; at least 1 is needed"),
        ({"start_epoch": 2}, "start_epoch is 2; at least lag_epochs, 3, before which nothing is remembered, is needed"),
        ({"temperature": 0.0}, "temperature is 0.0; a number above 0 is needed"),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"classes": 1}, "classes is 1"),
    ],
)
def test_options_out_of_their_range(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SAF(tmp_path, **{"classes": CLASSES, **options})


def test_a_batch_that_does_not_say_which_images_it_has_is_refused(tmp_path: Path) -> None:
    saf = SAF(tmp_path, CLASSES, lag_epochs=1, start_epoch=1)
    saf.begin_epoch(0)
    for extra in ((), (torch.tensor([1.0]),), (torch.tensor([1]), torch.tensor([1]))):
        with pytest.raises(ValueError, match="which images these are"):
            saf.attach([(torch.zeros(1, 1), torch.zeros(1), *extra)])


def test_one_step_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    """As a dry run takes."""
    saf = SAF(tmp_path / "outputs", CLASSES, lag_epochs=1, start_epoch=1)
    trained(saf, 0, [4])
    assert list(tmp_path.iterdir()) == []


def test_alone_no_other_process_is_asked() -> None:
    alone(_nothing_to_check)


def _nothing_to_check(world: World) -> None:
    check_shared(Path("/nowhere/outputs"), world)
