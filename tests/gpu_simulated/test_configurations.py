"""Every shipped configuration, built and stepped by the trainer itself on a pretended GPU, on every backend."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from ssam_scale.config.load import load
from ssam_scale.data.encode import Encoding
from ssam_scale.data.sources import Sample
from ssam_scale.data.write import write_samples
from ssam_scale.masks import masked
from ssam_scale.perturbation import Rehearsed
from ssam_scale.perturbation.phases import no_phases
from ssam_scale.sharding import World
from ssam_scale.train.build import build
from tests.support.images import make_image
from tests.support.pretended_gpu.watch import Watch
from tests.support.runs import run_length

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
IMAGES = 8
# Pixels and widths are fewer, so that a CPU steps them in a moment; all else is as in the file.
SIDE = 32
_VIT = [f"model.kwargs.{each}" for each in ("depth=4", "embed_dim=96", "num_heads=4", f"img_size={SIDE}")]
SMALLER = {
    "resnet50": ["model.kwargs.layers=[1,1,1,1]", "perturbation.mask.samples=8"],
    "convnext_t": ["model.kwargs.depths=[1,1,2,1]"],
    "vit_b": _VIT,
    # From no weights, of which there are none here, and in one micro-batch.
    "finetune_vit": ["model.name=vit_base_patch16_224", "model.pretrained=false", "train.max_micro_batch=null", *_VIT],
    "quickstart": ["data.subset=null"],
}


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images."""
    generator = np.random.default_rng(7)
    samples = [Sample(str(i), make_image(generator, 40, 36), i % 10) for i in range(2 * IMAGES)]
    out = tmp_path_factory.mktemp("images") / "images.beton"
    write_samples(samples, [str(k) for k in range(10)], out, Encoding(None, 90, 0.5, 0), source={}, progress=False)
    return out


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by Triton's kernels, which take a second here for what other tests see, too."""
    monkeypatch.setattr(masked, "_gpu", lambda: None)


def test_each_configuration_has_its_smaller_one() -> None:
    assert {path.stem for path in CONFIGS} == SMALLER.keys()


@pytest.mark.parametrize(
    "backend",
    [
        "as it says",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "zero3")),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("single", "ddp", "zero2")),
    ],
)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_is_built_and_stepped(path: Path, backend: str, world: World, beton: Path) -> None:
    overrides = [f"data.train={beton}", f"data.val={beton}", f"data.batch_size={IMAGES}", "model.num_classes=10"]
    overrides += [f"data.resolution={SIDE}", f"data.eval_resolution={SIDE}", *SMALLER[path.stem]]
    if backend != "as it says":
        overrides.append(f"sharding.backend={backend}")
    if path.stem == "vit_b" and backend in ("fsdp2", "zero3"):  # where no process holds all weights, as the file says
        overrides.append("perturbation.direction.scope=micro_batch")
    config = load(path, overrides)
    components = build(config, world, no_phases, run_length(config))
    assert {p.device.type for p in components.network.parameters()} == {"cuda"}
    images = torch.randn(IMAGES, 3, SIDE, SIDE).cuda().to(memory_format=torch.channels_last)
    labels = torch.arange(IMAGES).cuda()
    opt = components.opt
    if opt.refresh_is_due:
        opt.refresh(components.loss_fn, (images, labels), samples=2)
    mix = components.mix if components.mix is not None else lambda *batch: batch
    for _ in range(2):  # makes the optimizer's state, then DDP's buckets
        opt.step(components.loss_fn, mix(images, labels))
    with Watch() as watch:
        opt.step(components.loss_fn, mix(images, labels))
    assert opt.report is not None
    assert opt.report.loss is not None
    assert bool(opt.report.loss.isfinite())
    assert not opt.skipped
    named = opt.parameters.by_name.values()
    before = [shard.weight.clone() for shard in opt.sharding.shards(list(named))]
    with opt.rehearsal() as rehearse:  # a probe
        for kind in get_args(Rehearsed):
            rehearse(kind, components.loss_fn, mix(images, labels))
    after = [shard.weight for shard in opt.sharding.shards(list(named))]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    # DeepSpeed waits by itself: for the norms that it clips by, and for what it gathers.
    if not config.sharding.backend_on(world.size).startswith("zero"):
        assert not watch.host_waits


@pytest.mark.parametrize("term", ["{kind: saf, lag_epochs: 1, start_epoch: 1}", "{kind: mesa, start_epoch: 1}"])
def test_a_loss_term_lets_the_host_go_on(term: str, world: World, beton: Path, tmp_path: Path) -> None:
    """From what a batch is held against to the step that is by it; outputs are fetched beside the step that follows."""
    [path] = [path for path in CONFIGS if path.stem == "resnet50"]
    overrides = [f"data.train={beton}", f"data.val={beton}", f"data.batch_size={IMAGES}", "model.num_classes=10"]
    overrides += [f"data.resolution={SIDE}", f"data.eval_resolution={SIDE}", *SMALLER[path.stem]]
    overrides += [f"checkpoint.directory={tmp_path}", f"trajectory={term}", "perturbation.mask=null"]
    config = load(path, overrides)
    components = build(config, world, no_phases, run_length(config))
    trajectory, opt = components.trajectory, components.opt
    assert trajectory is not None
    losses = []
    for epoch in range(2):
        trajectory.begin_epoch(epoch)
        for step in range(3):
            images = torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(step)).cuda()
            labels = torch.arange(IMAGES).cuda()
            indices = (torch.arange(step * IMAGES, (step + 1) * IMAGES),) if "saf" in term else ()
            with Watch() as watch:
                batches = components.attached([(images, labels, *indices)])
                loss = opt.step(components.loss_fn, *batches)
            assert not watch.host_waits
            trajectory.after_step()
            losses.append(float(loss))
        trajectory.end_epoch()
    assert len(batches[0]) == 3
    reference = batches[0][2]
    assert reference.logits.device.type == "cuda"
    assert bool(torch.isfinite(reference.logits).all())
    assert float(trajectory.loss(reference.logits, reference._replace(indices=None))) == 0.0
    other = reference.logits + torch.arange(10).cuda()
    assert float(trajectory.loss(other, reference._replace(indices=None))) > 0.0
