"""Evaluation and averaged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale.config.load import load
from ssam_scale.data import eval_loader
from ssam_scale.models.ema import EMA
from ssam_scale.sharding import World
from ssam_scale.sharding.place import place, sharding_of
from ssam_scale.train.evaluation import Evaluation, evaluate
from tests.support.networks import small_network
from tests.support.ranks import run_ranks
from tests.support.runs import write_config


def _evaluate(world: World, path: str, backend: str) -> tuple[float, float, float, int]:
    config = load(Path(path))
    loader = eval_loader(config.data, rank=world.rank, world_size=world.size, device=world.device, num_classes=4)
    staged = small_network("vit")
    module, _ = place(
        staged, [s.block for s in staged.stages], backend, world, lambda: torch.optim.SGD(staged.parameters())
    )
    module.train()
    result = evaluate(module, loader, loader.batches_everywhere, world, torch.float32)
    assert all(m.training for m in module.modules())
    return result.top1, result.top5, result.loss, result.images


def _by_hand(path: Path) -> Evaluation:
    """Every image once, one at a time."""
    config = load(path)
    loader = eval_loader(config.data, rank=0, world_size=1, device=torch.device("cpu"), num_classes=4)
    model, rows = small_network("vit").eval(), []
    for images, labels in loader:
        for image, label in zip(images, labels, strict=True):
            with torch.no_grad():
                logits = model(image[None])[0]
            order = logits.argsort(descending=True).tolist()
            rows.append((order[0] == label, label in order[:5], F.cross_entropy(logits, label).item()))
    top1, top5, loss = (sum(map(float, column)) / len(rows) for column in zip(*rows, strict=True))
    return Evaluation(100 * top1, 100 * top5, loss, len(rows))


@pytest.mark.parametrize(
    ("backend", "size"),
    [
        ("single", 1),
        pytest.param("ddp", 2, marks=pytest.mark.slow),
        pytest.param("fsdp2", 3, marks=pytest.mark.slow),
    ],
)
def test_every_image_counts_once_on_any_number_of_processes(
    backend: str, size: int, data: Path, tmp_path: Path
) -> None:
    # 20 images in batches of 8 over 3 processes: 7 + 7 + 6 images, in 4 + 4 + 3 batches of 2.
    path = write_config(tmp_path / "run.yaml", data)
    expected = _by_hand(path)
    assert expected.images == 20
    ranks = [_evaluate(World(), str(path), backend)] if size == 1 else run_ranks(size, _evaluate, str(path), backend)
    for top1, top5, loss, images in ranks:
        assert images == 20
        assert (top1, top5) == (expected.top1, expected.top5)
        assert loss == pytest.approx(expected.loss, abs=1e-6)


@pytest.mark.parametrize(("classes", "top5"), [(4, None), (5, None), (6, 50.0)])
def test_five_best_of_five_classes_or_fewer_are_left_out(classes: int, top5: float | None) -> None:
    scores = torch.arange(float(classes))[None].expand(2, classes)  # the first class scores lowest, the last highest
    batch = scores, torch.tensor([0, classes - 1])
    result = evaluate(nn.Identity(), [batch], 1, World(), torch.float32)
    assert (result.top1, result.top5, result.images) == (50.0, top5, 2)


def _average(world: World, backend: str) -> list[torch.Tensor]:
    staged = small_network("vit")
    module, _ = place(
        staged, [s.block for s in staged.stages], backend, world, lambda: torch.optim.SGD(staged.parameters())
    )
    average = EMA(staged.model, 0.75, sharding_of(module))
    x = torch.ones(2, 3, 32, 32)
    module.eval()
    with torch.no_grad():
        outputs = [module(x)]
        for _ in range(2):
            sharding = sharding_of(module)
            for shard in sharding.shards(list(module.parameters())):
                shard.weight.add_(0.01)
            sharding.publish()
            average.update()
        outputs.append(module(x))
        with average.swapped_in():
            outputs.append(module(x))
        outputs.append(module(x))
    return outputs


@pytest.mark.parametrize(("backend", "size"), [("single", 1), pytest.param("fsdp2", 2, marks=pytest.mark.slow)])
def test_averaged_weights_serve_inside_and_are_gone_outside(backend: str, size: int) -> None:
    ranks = [_average(World(), backend)] if size == 1 else run_ranks(size, _average, backend)
    model = small_network("vit").eval()
    # With decay ¾ over w, w + d, w + 2d: w + ¼d after the first update, w + ¾·¼d + ¼·2d = w + 0.6875d after the second.
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()) + 0.006875, model.parameters())
    with torch.no_grad():
        expected = model(torch.ones(2, 3, 32, 32))
    for before, live, averaged, after in ranks:
        assert not torch.equal(before, live)
        torch.testing.assert_close(averaged, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(live, after)


def test_logits_of_mirror_images_are_averaged() -> None:
    """`data.eval_flip`: of a network that sees the left half alone, both halves count."""
    seen: list[Tensor] = []

    class LeftHalf(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images[..., 0].sum((1, 2))[:, None] * torch.tensor([1.0, 0.0])

    images = torch.tensor([[1.0, -3.0], [2.0, 1.0]])[:, None, None, :]  # each half's value
    labels = torch.tensor([1, 0])
    plain = evaluate(LeftHalf(), [(images, labels)], 1, World(), torch.float32)
    assert (plain.top1, len(seen)) == (50.0, 1)
    both = evaluate(LeftHalf(), [(images, labels)], 1, World(), torch.float32, flip=True)
    assert both.top1 == 100.0
    assert torch.equal(seen[2], images.flip(-1))
    logits = torch.tensor([[-1.0, 0.0], [1.5, 0.0]])
    assert both.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), abs=1e-6)
