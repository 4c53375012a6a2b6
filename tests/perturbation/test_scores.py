"""Scores are exact, the same bit for bit on any number of processes under every backend, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale.perturbation import rng
from ssam_scale.perturbation.scores import (
    per_sample_scores,
    random_scores,
    sampled_label_loss,
    sampled_labels,
    weight_scores,
)
from ssam_scale.perturbation.scores.samples import round_robin_samples
from ssam_scale.sharding import ProcessGroup, Sharding, World
from ssam_scale.sharding.place import place, sharding_of
from tests.support.networks import CLASSES, batches, loss_fn, small_network
from tests.support.precision import fp16_supported
from tests.support.ranks import alone, run_ranks

KINDS = ("fisher", "gradient")
Scores = dict[str, dict[str, Tensor]]


@contextmanager
def one_thread() -> Iterator[None]:
    """As `run_ranks` has it: how many threads a sum is shared by changes its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Odd(nn.Module):
    """Tied weights, frozen ones, unused ones, a tensor of one weight, a BatchNorm and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.unused = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.ones(1))
        self.out = nn.Linear(6, CLASSES, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.embedding((images.flatten(1)[:, :8].abs() * 3).long() % CLASSES).mean(1)
        return self.out(self.scale * self.dropout(self.norm(self.frozen(hidden))))


def make_model(family: str) -> nn.Module:
    return Odd() if family == "odd" else small_network(family)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def oracle(model: nn.Module, batch: Any, loss: Callable[..., Tensor] = loss_fn) -> Scores:
    """The definition, on a plain model: one `autograd.grad` a sample."""
    model.eval()
    named = trained(model)
    squares = {name: torch.zeros_like(p) for name, p in named.items()}
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    for i in range(len(batch[0])):
        value = loss(model, (batch[0][i : i + 1].clone(), batch[1][i : i + 1].clone()))
        for name, g in zip(named, torch.autograd.grad(value, list(named.values()), allow_unused=True), strict=True):
            if g is not None:
                squares[name] += g**2
                sums[name] += g
    return {"fisher": squares, "gradient": {name: g.abs() for name, g in sums.items()}}


def sharded(world: World, backend: str, family: str, **kwargs: Any) -> tuple[Sharding, torch.optim.Optimizer, Any]:
    """A model under a backend, in training mode, its base optimizer and its trained parameters by name."""
    model = make_model(family).train()
    blocks = [stage.block for stage in model.stages] if family != "odd" else [model.unused]
    placed, base = place(
        model,
        blocks,
        backend,  # type: ignore[arg-type]
        world,
        lambda: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        **kwargs,
    )
    sharding = sharding_of(placed)
    base, _ = sharding.unwrap_optimizer(base, None)
    return sharding, base, trained(model)


def gathered(sharding: Sharding, named: dict[str, nn.Parameter], local: list[Tensor]) -> dict[str, Tensor]:
    result = {}
    for (name, p), shard, score in zip(named.items(), sharding.shards(list(named.values())), local, strict=True):
        assert score.dtype == torch.float32
        assert score.shape == shard.weight.shape
        result[name] = sharding.gather(p, score).clone()
    return result


def own_batches(world: World, samples: int, each: int = 2) -> list[Any]:
    """This rank's batches of `each`, whose k-th on all ranks together are the k-th part of one order of samples."""
    images, labels = batches(1, 24)[0]
    step = each * world.size
    starts = range(world.rank * each, -(-samples // step) * step, step)
    return [(images[s : s + each], {"labels": labels[s : s + each], "plain": 1}) for s in starts]


def nested_loss(forward: Any, batch: Any) -> Tensor:
    assert batch[1]["plain"] == 1
    assert len(batch[0]) == 1
    return loss_fn(forward, (batch[0], batch[1]["labels"])).float()


def dropped_label_loss(forward: Any, batch: Any) -> Tensor:
    return sampled_label_loss(forward, batch)


def score_all(world: World, work: list[tuple[str, str, int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Whole scores of every kind, with the data's labels and with sampled ones, for each way of distributing."""
    results = []
    for backend, family, samples, more in work:
        sharding, base, named = sharded(world, backend, family, **more)
        parameters = list(named.values())
        result: dict[str, Any] = {}
        for way, loss in (("true", nested_loss), ("sampled", dropped_label_loss)):
            local = per_sample_scores(
                sharding,
                base,
                parameters,
                loss,
                iter(own_batches(world, samples)),
                kinds=KINDS,
                samples=samples,
                seed=3,
            )
            result |= {f"{way} {kind}": gathered(sharding, named, s) for kind, s in local.items()}
        result["weight"] = gathered(sharding, named, weight_scores(sharding, parameters))
        result["random"] = gathered(sharding, named, random_scores(sharding, parameters, 5))
        result["left"] = [name for name, m in sharding.network.named_modules() if not m.training]
        result["gradients"] = [float(g.abs().max()) for g in sharding.gradients(parameters) if g.numel()]
        result["buffers"] = {n: b.clone() for n, b in make_model(family).named_buffers()}
        result["buffers"] = [n for n, b in sharding.network.named_buffers() if not torch.equal(b, result["buffers"][n])]
        results.append(result)
    return results


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Where two sets of tensors differ."""
    assert a.keys() == b.keys()
    return [f"{name} by {float((t - b[name]).abs().max())}" for name, t in a.items() if not torch.equal(t, b[name])]


def check(size: int, work: list[tuple[str, str, int, dict[str, Any]]]) -> None:
    with one_thread():
        expected = {key: alone(score_all, [("single", *key, {})])[0] for key in {entry[1:3] for entry in work}}
    for rank in run_ranks(size, score_all, work):
        for entry, result in zip(work, rank, strict=True):
            for what, values in expected[entry[1:3]].items():
                if isinstance(values, dict):
                    assert not (apart := same(values, result[what])), f"{entry} × {size}: {what} {apart}"
            assert not result["left"], entry
            assert not result["buffers"], entry
            assert not any(result["gradients"]), entry


FAMILIES = [("resnet", 7), ("vit", 8), ("odd", 5)]
# Every backend and number of processes holds with every family; to save time, some of it has been left out.
WHOLE: dict[int, list[Any]] = {
    2: [(backend, family, n, {}) for backend in ("ddp", "fsdp2") for family, n in FAMILIES],
    3: [("ddp", "odd", 5, {}), ("fsdp2", "odd", 5, {}), ("fsdp2", "resnet", 7, {})],
}
ZERO: dict[int, list[Any]] = {
    # Not stage 3 on one process: it computes with views of a flat buffer, which a tensor of one weight puts out of
    # alignment.
    1: [("zero1", "odd", 5, {})],
    2: [
        ("zero0", "vit", 8, {}),
        *((backend, family, n, {}) for backend in ("zero1", "zero3") for family, n in FAMILIES),
    ],
    3: [("zero2", "odd", 5, {}), ("zero3", "resnet", 7, {})],
}


@pytest.mark.parametrize("family", ["resnet", "vit", "odd"])
def test_scores_are_the_definition(family: str) -> None:
    with one_thread():
        [result] = alone(score_all, [("single", family, 5, {})])
        images, labels = batches(1, 24)[0]
        expected = oracle(make_model(family), (images[:5], labels[:5]))
    for kind in KINDS:
        assert not same(expected[kind], result[f"true {kind}"])
    assert all(not expected["fisher"][n].any() for n in expected["fisher"] if n.startswith("unused"))


@pytest.mark.slow
@pytest.mark.parametrize("size", WHOLE)
def test_ddp_and_fsdp2_have_the_bits_of_one_process(size: int) -> None:
    check(size, WHOLE[size])


@pytest.mark.slow
def test_one_sample_and_replicas_on_four_processes() -> None:
    check(4, [*(("fsdp2", "odd", 5, {"replicas": r}) for r in (1, 2)), ("fsdp2", "vit", 1, {})])


@pytest.mark.slow
@pytest.mark.parametrize("size", ZERO)
def test_zero_has_the_bits_of_one_process(size: int) -> None:
    check(size, ZERO[size])


# --- samples


def _faults(world: World) -> list[str]:
    """What is said of batches that do not fit, on this rank."""
    sharding, base, named = sharded(world, "ddp", "vit")
    images, labels = batches(1, 24)[0]
    said = []

    def broken() -> Iterator[Any]:
        yield images[:2], labels[:2]
        if world.rank == 1:
            raise OSError("the disk is gone")
        yield images[:2], labels[:2]

    def never(*_: Any) -> Tensor:
        raise AssertionError("a pass was made")

    mine = 2 + world.rank
    faults: list[tuple[Any, int | None]] = [
        ([], None),
        ([(images[:2], labels[:2])], 9),
        ([(images[:mine], labels[:mine])], None),
        ([(images[:2], labels[:2])] * mine, None),
        ([(images[:2], labels[:2].to(torch.int32) if world.rank else labels[:2])], None),
        ([(images[:2], labels[:3])], None),
        ([(1, "two")], None),
        ([(images[:2], {1, 2})], None),
        ([(images[:2], torch.ones(()))], None),
        ([(images[:0], labels[:0])], None),
        ([(images[:2], labels[:2])], 0),
        (broken(), None),
    ]
    for data, samples in faults:
        try:
            per_sample_scores(sharding, base, list(named.values()), never, data, samples=samples)
        except (ValueError, RuntimeError, OSError) as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("nothing")
    return said


def test_batches_that_do_not_fit_are_an_error_on_every_process() -> None:
    first, second = run_ranks(2, _faults)
    assert first[:-1] == second[:-1]
    assert first[-1] == "RuntimeError: process 1 has no samples: the disk is gone"
    assert second[-1] == "OSError: the disk is gone"
    for message, expected in zip(
        first,
        [
            "at least one sample",
            "9 samples are asked for but the batches of all processes hold 4",
            "batch 0 is 2 samples of float32 (3, 32, 32), int64 () on process 0 but 3 samples of float32 (3, 32, 32)",
            "process 0 has 2 batches of samples but process 1 has 3",
            "int64 () on process 0 but 2 samples of float32 (3, 32, 32), int32 () on process 1",
            "tensors of 2 and of 3 samples",
            "holds no tensor",
            "holds a set",
            "without dimensions",
            "at least one sample",
            "samples is 0",
            "RuntimeError",
        ],
        strict=True,
    ):
        assert expected in message


def _dealt(world: World) -> list[Any]:
    """The numbers of this rank's samples, of batches of 3 a rank in a reused buffer."""
    group = sharding_of(nn.parallel.DistributedDataParallel(nn.Linear(1, 1))).data_parallel_group
    seen, asked = [], 0
    for samples in (None, 1, 2, 7, 18, 100):

        def reused(asked: list[int]) -> Iterator[Tensor]:
            buffer = torch.empty(3, 2, dtype=torch.bfloat16)
            for k in range(6):
                asked.append(k)
                buffer[:] = (k * 3 * world.size + world.rank * 3 + torch.arange(3))[:, None]
                yield buffer

        calls: list[int] = []
        asked = calls
        own, total = round_robin_samples(group, reused(calls), samples if samples != 100 else 6 * 3 * world.size)
        seen.append(([int(sample[0, 0]) for sample in own], total, len(asked)))
    return seen


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_samples_are_dealt_in_turn_and_no_more_is_asked_for(size: int) -> None:
    for rank, seen in enumerate(run_ranks(size, _dealt)):
        for (numbers, total, asked), wanted in zip(seen, (None, 1, 2, 7, 18, 100), strict=True):
            every = 18 * size
            assert total == (every if wanted in (None, 100) else wanted)
            assert asked == -(-total // (3 * size))
            due = list(range(rank, total, size))
            assert numbers[: len(due)] == due
            assert len(numbers) == -(-total // size)


# --- no trace


def _state(model: nn.Module) -> list[Any]:
    return [
        {name: t.clone() for name, t in model.state_dict().items()},
        [m.training for m in model.modules()],
        [p.grad for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        torch.get_rng_state(),
    ]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("where", ["nowhere", "before", "after"])
def test_nothing_is_left_behind(where: str) -> None:
    model = Odd().train()
    model.norm.eval()  # frozen by its owner
    base = torch.optim.SGD(trained(model).values(), lr=0.1)
    sharding, calls = sharding_of(model), []

    def loss(forward: Any, batch: Any) -> Tensor:
        calls.append(torch.rand(()))
        if where == "before" and len(calls) == 3:
            raise ArithmeticError
        value = loss_fn(forward, batch)
        if where == "after" and len(calls) == 3:
            raise ArithmeticError
        return value

    before = _state(model)
    if where == "nowhere":
        per_sample_scores(sharding, base, list(trained(model).values()), loss, batches(1, 4))
        assert len({float(c) for c in calls}) == 4
    else:
        with pytest.raises(ArithmeticError):
            per_sample_scores(sharding, base, list(trained(model).values()), loss, batches(1, 4))
    assert _equal(before, _state(model))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    loss_fn(model, batches(1, 4)[0]).backward()
    assert model.scale.grad is not None


def _failure(world: World, backends: list[str]) -> list[str]:
    """Every rank fails in its second sample: what differs after that from a model that never failed."""
    wrong = []
    for backend in backends:
        results = []
        for fails in (True, False):
            sharding, base, named = sharded(world, backend, "vit")
            calls: list[int] = []

            def loss(forward: Any, batch: Any, calls: list[int] = calls, fails: bool = fails) -> Tensor:
                value = nested_loss(forward, batch)
                calls.append(1)
                if fails and len(calls) == 2:
                    raise ArithmeticError
                return value

            if fails:
                with pytest.raises(ArithmeticError):
                    per_sample_scores(sharding, base, list(named.values()), loss, own_batches(world, 8))
                if any(not m.training for m in sharding.network.modules()):
                    wrong.append(f"{backend}: mode")
            scores = per_sample_scores(sharding, base, list(named.values()), loss, own_batches(world, 8))["fisher"]
            with sharding.micro_batch(last=True):
                sharding.backward(nested_training_loss(sharding.descent_module, own_batches(world, 4)[0]))
            gradients = [g.clone() for g in sharding.gradients(list(named.values()))]
            results.append([*scores, *gradients])
        if not _equal(*results):
            wrong.append(backend)
    return wrong


def nested_training_loss(forward: Any, batch: Any) -> Tensor:
    return loss_fn(forward, (batch[0], batch[1]["labels"]))


@pytest.mark.slow
def test_a_loss_that_raises_leaves_a_model_that_goes_on() -> None:
    assert run_ranks(2, _failure, ["ddp", "fsdp2"]) == [[], []]


@pytest.mark.slow
def test_a_loss_that_raises_leaves_an_engine_that_goes_on() -> None:
    assert run_ranks(2, _failure, [f"zero{stage}" for stage in range(4)]) == [[], []]


# --- low precision


def test_a_scale_is_divided_out_and_made_smaller_until_nothing_overflows() -> None:
    model = nn.Linear(3, CLASSES)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(4, 3), torch.randint(CLASSES, (4,))
    sharding, calls = sharding_of(model), []

    def loss(forward: Any, batch: Any) -> Tensor:
        calls.append(1)
        value = F.cross_entropy(forward(batch[0]), batch[1])
        # As float16 would: a gradient above 65504 is not finite.
        value.register_hook(lambda g: torch.where(g > 65504.0, torch.inf, g))
        return value

    parameters = list(model.parameters())
    plain = per_sample_scores(sharding, base, parameters, loss, [(x, y)])["fisher"]
    assert len(calls) == 4
    scaled = per_sample_scores(sharding, base, parameters, loss, [(x, y)], scale=1024.0)["fisher"]
    assert len(calls) == 8
    overflowed = per_sample_scores(sharding, base, parameters, loss, [(x, y)], scale=2.0**30)["fisher"]
    assert len(calls) == 20
    assert _equal(plain, scaled)
    assert _equal(plain, overflowed)

    def infinite(forward: Any, batch: Any) -> Tensor:
        return loss(forward, batch) * torch.inf

    assert (
        not torch.stack([s.sum() for s in per_sample_scores(sharding, base, parameters, infinite, [(x, y)])["fisher"]])
        .isfinite()
        .any()
    )


def _fp16(world: World) -> list[str]:
    """Float16 engines, whose first scale of the loss overflows, against float32."""
    wrong = []
    sharding, base, named = sharded(world, "ddp", "vit")
    data = own_batches(world, 8)
    exact = gathered(
        sharding, named, per_sample_scores(sharding, base, list(named.values()), nested_loss, data)["fisher"]
    )
    for stage in (1, 2, 3):
        for precision in ("fp16", "bf16"):
            power = {"initial_scale_power": 30} if precision == "fp16" else {}
            with fp16_supported():
                sharding, base, named = sharded(
                    world, f"zero{stage}", "vit", deepspeed={precision: {"enabled": True, **power}}
                )
            dtype = next(iter(named.values())).dtype
            low = [(images.to(dtype), rest) for images, rest in data]
            local = per_sample_scores(sharding, base, list(named.values()), nested_float_loss, low)["fisher"]
            scores = gathered(sharding, named, local)
            apart = sum(float((scores[n] - exact[n]).square().sum()) for n in exact) ** 0.5
            apart /= sum(float(exact[n].square().sum()) for n in exact) ** 0.5
            if not apart < (0.02 if precision == "fp16" else 0.15):
                wrong.append(f"{stage} {precision}: {apart}")
            if world.first:
                print(f"zero{stage} {precision}: {apart:.1e} from float32")
    return wrong


def nested_float_loss(forward: Any, batch: Any) -> Tensor:
    return F.cross_entropy(forward(batch[0]).float(), batch[1]["labels"])


@pytest.mark.slow
def test_low_precision_engines_are_finite_and_near_float32() -> None:
    assert run_ranks(2, _fp16) == [[], []]


def _fsdp_bf16(world: World) -> float:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = small_network("vit")
    fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    sharding, named = sharding_of(model), trained(model)
    local = per_sample_scores(sharding, base, list(named.values()), nested_float_loss, own_batches(world, 8))["fisher"]
    scores = gathered(sharding, named, local)
    images, labels = batches(1, 24)[0]
    exact = oracle(small_network("vit"), (images[:8], labels[:8]))["fisher"]
    apart = sum(float((scores[n] - exact[n]).square().sum()) for n in exact) ** 0.5
    return apart / sum(float(exact[n].square().sum()) for n in exact) ** 0.5


@pytest.mark.slow
def test_a_bf16_policy_of_fsdp2_is_near_float32() -> None:
    assert all(0.0 < apart < 0.15 for apart in run_ranks(2, _fsdp_bf16))


# --- labels, weights, random numbers


def test_sampled_labels_follow_the_models_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 2.0, -1.0]]).expand(20_000, 3).to(torch.bfloat16)
    counts = torch.bincount(sampled_labels(logits), minlength=3) / 20_000
    assert torch.allclose(counts, logits[0].float().softmax(0), atol=0.015)


def test_the_random_state_is_the_seeds_and_the_samples() -> None:
    model = nn.Linear(3, CLASSES)
    base, sharding = torch.optim.SGD(model.parameters(), lr=0.1), sharding_of(model)
    seen: list[float] = []

    def loss(forward: Any, batch: Any) -> Tensor:
        seen.append(float(torch.rand(())))
        return forward(batch).sum()

    for seed, samples in ((0, 3), (0, 4), (1, 3)):
        per_sample_scores(sharding, base, [model.weight], loss, [torch.randn(4, 3)], samples=samples, seed=seed)
    assert seen[:3] == seen[3:6]
    assert len(set(seen)) == 7


def test_random_scores_are_splitmix64_of_the_position(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = 2**64 - 1

    def splitmix(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        return state ^ (state >> 31)

    assert splitmix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the first output of seed 0, as published
    monkeypatch.setattr(rng, "_TOGETHER", 7)
    model = nn.Linear(5, 4)
    result = random_scores(sharding_of(model), list(model.parameters()), 11)
    for index, score in enumerate(result):
        key = rng.hashed(11, index)
        assert score.flatten().tolist() == [
            (splitmix((key + (i + 1) * 0x9E3779B97F4A7C15) & mask) >> 40) / 2**24 for i in range(score.numel())
        ]
    monkeypatch.undo()
    many = random_scores(sharding_of(nn.Linear(1000, 1000)), [nn.Parameter(torch.empty(1000, 1000))], 0)[0]
    assert 0.0 <= float(many.min()) < 1e-5
    assert 1.0 > float(many.max()) > 1 - 1e-5
    assert abs(float(many.mean()) - 0.5) < 1e-3
    assert abs(float(many.var()) - 1 / 12) < 1e-3
    assert abs(float(torch.corrcoef(torch.stack((many.flatten()[1:], many.flatten()[:-1])))[0, 1])) < 5e-3


def test_peers_alone_send_nothing() -> None:
    group = ProcessGroup()
    assert (group.size, group.rank, group.all_gather_object("x")) == (1, 0, ["x"])
    assert group.all_to_all(torch.arange(3), [3], [3])[0].tolist() == [0, 1, 2]
