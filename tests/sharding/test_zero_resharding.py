"""DeepSpeed checkpoints of two processes, gone on with on another number of them: by its universal checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ssam_scale.masks import NM, Scored
from ssam_scale.perturbation import SparseSAM
from ssam_scale.sharding import World
from ssam_scale.sharding.place import place
from tests.support.masks import whole_mask
from tests.support.networks import batches, freeze_batchnorm, loss_fn, part, small_network
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

BATCH, BEFORE, AFTER = 12, 2, 2
MASKS = {"element": lambda: Scored("element", 0.5), "row": lambda: Scored("row", 0.5), "nm": lambda: NM(2, 4)}
CASES = [(1, "nm"), (2, "row"), (3, "element")]  # stage, mask


def started(world: World, stage: int, mask: str, seed: int, **deepspeed: Any) -> tuple[Any, SparseSAM]:
    model = freeze_batchnorm(small_network("vit", seed, in_chans=4) if mask == "nm" else small_network("vit", seed))
    backend: Any = f"zero{stage}"
    engine, base = place(
        model,
        [],
        backend,
        world,
        lambda: torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3),
        batch_size=BATCH // world.size,
        deepspeed=deepspeed,
    )
    return engine, SparseSAM(engine, base, rho=0.1, mask=MASKS[mask](), norm="calibrated")


def steps(world: World, opt: SparseSAM, mask: str, first: int, last: int) -> None:
    for images, labels in batches(last, BATCH)[first:]:
        if mask == "nm":
            images = torch.cat([images, images[:, :1]], 1)
        own = part((images, labels), world.rank, world.size)
        if opt.refresh_is_due:
            opt.refresh(loss_fn, own)
        opt.step(loss_fn, own)


def look(opt: SparseSAM) -> dict[str, torch.Tensor]:
    named, sharding = opt.parameters.by_name, opt.sharding
    return {n: sharding.gather(p, sharding.shards([p])[0].weight).clone() for n, p in named.items()}


def save(world: World, folder: Path) -> list[Any]:
    results = []
    for stage, mask in CASES:
        engine, opt = started(world, stage, mask, 0)
        steps(world, opt, mask, 0, BEFORE)
        engine.save_checkpoint(str(folder / mask), tag="saved", client_state=opt.sparse.state_dict())
        chosen = whole_mask(opt)
        steps(world, opt, mask, BEFORE, BEFORE + AFTER)
        results.append((chosen, look(opt), opt.steps))
    return results


def resume(world: World, folder: Path) -> list[Any]:
    results = []
    for stage, mask in CASES:
        engine, opt = started(world, stage, mask, 1, checkpoint={"load_universal": True})
        _, client_state = engine.load_checkpoint(str(folder / mask), tag="universal")
        opt.sparse.load_state_dict(client_state)
        chosen = whole_mask(opt)
        steps(world, opt, mask, BEFORE, BEFORE + AFTER)
        results.append((chosen, look(opt), opt.steps))
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    uninterrupted = run_ranks(2, save, folder)[0]
    for _, mask in CASES:
        subprocess.run(
            [
                *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"),
                *("--input_folder", folder / mask / "saved", "--output_folder", folder / mask / "universal"),
            ],
            check=True,
        )
    return folder, uninterrupted


@pytest.mark.parametrize("size", [1, 3])
def test_masks_weights_and_momentum_go_to_other_numbers_of_processes(saved: tuple[Path, list[Any]], size: int) -> None:
    folder, uninterrupted = saved
    for rank in run_ranks(size, resume, folder):
        for case, (chosen, weights, taken), (old_chosen, old_weights, old_taken) in zip(
            CASES, rank, uninterrupted, strict=True
        ):
            assert taken == old_taken == BEFORE + AFTER
            assert chosen.keys() == old_chosen.keys()
            assert all(torch.equal(mask, old_chosen[name]) for name, mask in chosen.items()), case
            for name, weight in weights.items():
                # The same arithmetic in another order of summation, as in test_equivalence.
                torch.testing.assert_close(weight, old_weights[name], rtol=0, atol=1e-6, msg=f"{case} {name}")
