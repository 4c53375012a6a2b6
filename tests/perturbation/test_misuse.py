"""What people give SparseSAM by mistake: one sentence that says what would work, before anything is trained."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import ModelAverager
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import PostLocalSGDOptimizer, _apply_optimizer_in_backward

from ssam_scale import CosineRadius, Depth, Fresh, Interval, Named, Scored, SparseSAM, Window
from ssam_scale.masks import Mask
from ssam_scale.models import staged
from ssam_scale.perturbation import Savings, Stage, StagedModel
from ssam_scale.sharding import World
from ssam_scale.sharding.unsupported import refuse_unsupported
from tests.support.networks import batches, loss_fn, small_network
from tests.support.ranks import run_ranks

BATCH = batches(1, 4)[0]


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.Tanh(), nn.Linear(8, 10))


def optimizer(model: nn.Module | None = None, **options: Any) -> SparseSAM:
    model = small() if model is None else model
    return SparseSAM(model, sgd(model), rho=0.1, **options)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.complex64))


class Eighth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.float8_e4m3fn))


class Overlapping(torch.optim.SGD):
    """As torch's `ZeroRedundancyOptimizer` can be."""

    _overlap_with_ddp = True


def for_inference() -> nn.Module:
    with torch.inference_mode():
        return small()


class OtherSAM(torch.optim.SGD):
    """Of the kind that has two methods for the two halves of a step."""

    def first_step(self, zero_grad: bool = False) -> None: ...

    def second_step(self, zero_grad: bool = False) -> None: ...


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return closure()


IN_BACKWARD = "parameter 1.weight has a hook that steps an optimizer in the backward.*: remove the hook"


class Averager(ModelAverager):
    """Of no process group."""

    def __init__(self) -> None: ...

    def average_parameters(self, params: Any) -> None: ...


class Stepper:
    """The kind of optimizer in the backward that is an object with a method."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def hook(self, parameter: Tensor) -> None:
        optimizer = self.optimizers[parameter]  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()


def stepped_in_backward(how: str) -> nn.Module:
    """A model whose weights are stepped as soon as their gradient is there, as torch's tutorial has it."""
    model = small()
    if how == "torch":
        _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
        return model
    stepper = Stepper(model)
    optimizers = stepper.optimizers

    def hook(parameter: Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook if how == "a closure" else stepper.hook)
    return model


def of_timm(model: nn.Module, name: str) -> Any:
    import timm.optim  # which ssam_scale.models has made importable

    return timm.optim.create_optimizer_v2(model, opt=name, lr=0.1)


def of(model: nn.Module, **options: Any) -> Callable[[], Any]:
    return lambda: optimizer(model, **options)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a mask's name": (lambda: optimizer(mask="depth"), TypeError, r"mask is 'depth' \(str\); an instance .* Depth\(\)"),
    "a mask's class": (lambda: optimizer(mask=Depth), TypeError, r"mask is the class Depth; .* Depth\(…\)"),
    "an optimizer's class": (
        lambda: SparseSAM(small(), torch.optim.SGD),  # type: ignore[arg-type]
        TypeError,
        r"class SGD; an instance is needed: SGD\(model.parameters\(\), lr=0.1\)",
    ),
    "parameters for an optimizer": (
        lambda: SparseSAM(small(), list(small().parameters())),  # type: ignore[arg-type]
        TypeError,
        "base_optimizer is a list of Parameter; a torch.optim.Optimizer is needed",
    ),
    "a SparseSAM for a base optimizer": (
        lambda: SparseSAM(m := small(), SparseSAM(m, sgd(m))),
        ValueError,
        "is a SparseSAM already",
    ),
    "LBFGS": (lambda: SparseSAM(m := small(), torch.optim.LBFGS(m.parameters())), ValueError, "use SGD or AdamW"),
    "SparseAdam": (
        lambda: SparseSAM(m := small(), torch.optim.SparseAdam(m.parameters())),
        ValueError,
        "use Adam or AdamW",
    ),
    "a model's class": (lambda: SparseSAM(nn.Linear, sgd(small())), TypeError, "the class Linear; an instance"),  # type: ignore[arg-type]
    "a model's name": (lambda: SparseSAM("resnet50", sgd(small())), TypeError, r"model is 'resnet50' \(str\)"),  # type: ignore[arg-type]
    "another model's optimizer": (
        lambda: SparseSAM(small(), sgd(small())),
        ValueError,
        "4 of the optimizer's parameters are not the model's: .* build the optimizer last",
    ),
    "a copy's optimizer": (lambda: SparseSAM(copy.deepcopy(m := small()), sgd(m)), ValueError, "over another model"),
    "rho as text": (
        lambda: SparseSAM(m := small(), sgd(m), rho="0.1"),  # type: ignore[arg-type]
        TypeError,
        r"rho is '0.1' \(str\); a radius of at least 0",
    ),
    "a SAM's arguments": (
        lambda: SparseSAM(small().parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9),  # type: ignore[arg-type]
        TypeError,
        r"class SGD; an instance is needed: SGD\(model.parameters\(\), lr=0.1, momentum=0.9\)",
    ),
    "the base optimizer's arguments": (
        of(small(), lr=0.1),
        TypeError,
        r"no argument lr; .* given to it: SGD\(…, lr=…\)",
    ),
    "a subclass of LBFGS": (
        lambda: SparseSAM(m := small(), type("Mine", (torch.optim.LBFGS,), {})(m.parameters())),
        ValueError,
        "use SGD or AdamW",
    ),
    "another SAM": (
        lambda: SparseSAM(m := small(), OtherSAM(m.parameters(), lr=0.1)),
        ValueError,
        "OtherSAM, which pert",
    ),
    "a step that needs a closure": (
        lambda: SparseSAM(m := small(), NeedsClosure(m.parameters(), lr=0.1)),
        ValueError,
        "NeedsClosure.step needs a closure",
    ),
    "a rho of its own": (
        lambda: SparseSAM(m := small(), torch.optim.Adadelta(m.parameters()), rho=0.05),
        ValueError,
        "Adadelta has a rho of its own in its parameter groups, which is no radius",
    ),
    "an optimizer of second order": (
        lambda: SparseSAM(m := small(), of_timm(m, "adahessian")),
        ValueError,
        "Adahessian differentiates the gradient again",
    ),
    "a differentiable optimizer": (
        lambda: SparseSAM(m := small(), torch.optim.SGD(m.parameters(), lr=0.1, differentiable=True)),
        ValueError,
        "use False",
    ),
    "a group's rho as text": (
        lambda: SparseSAM(m := small(), torch.optim.SGD([{"params": m.parameters(), "rho": "0.1"}], lr=0.1)),
        TypeError,
        r"the rho of a parameter group is '0.1' \(str\)",
    ),
    "clipping to a negative norm": (
        of(small(), max_grad_norm=-1.0),
        ValueError,
        "max_grad_norm is -1.0; a norm above 0",
    ),
    "clipping to zero": (of(small(), max_grad_norm=0), ValueError, "max_grad_norm is 0; a norm above 0"),
    "a fraction as text": (lambda: Fresh("0.5"), TypeError, r"fraction is '0.5' \(str\); a share in \(0, 1\]"),
    "half a step": (of(small(), calibrate_every=2.5), TypeError, "calibrate_every is 2.5 .*; a whole number"),
    "a scaler's switch": (of(small(), scaler=True), TypeError, r"scaler is True \(bool\); a torch.amp.GradScaler"),
    "a scaler's class": (of(small(), scaler=torch.amp.GradScaler), TypeError, "scaler is the class GradScaler"),
    "a schedule's class": (
        of(small(), schedule=CosineRadius),
        TypeError,
        "schedule is the class CosineRadius; a sched",
    ),
    "a factor for a schedule": (
        of(small(), schedule=0.5),
        TypeError,
        r"schedule is 0.5 \(float\); a schedule is needed",
    ),
    "a schedule of the step": (of(small(), schedule=lambda s: 1.0), TypeError, "does not take a step and a group"),
    "a switch as text": (of(small(), adaptive="no"), TypeError, r"adaptive is 'no' \(str\); True or False is needed"),
    "a switch as a number": (of(small(), adaptive=0), TypeError, r"adaptive is 0 \(int\); True or False"),
    "a saving as text": (lambda: Savings(pack="off"), TypeError, r"savings.pack is 'off' \(str\); True or False"),  # type: ignore[arg-type]
    "savings as a switch": (of(small(), savings=True), TypeError, r"savings is True \(bool\); Savings"),
    "no phases": (of(small(), phases=None), TypeError, "phases is None"),
    "a window of shares": (lambda: Window(0.1, 0.5), TypeError, r"start is 0.1 \(float\); a whole number"),  # type: ignore[arg-type]
    "an interval of halves": (lambda: Interval(2.5), TypeError, "every is 2.5 .*; a whole number"),  # type: ignore[arg-type]
    "an interval of a class": (lambda: Interval(2, CosineRadius), TypeError, "the class CosineRadius"),  # type: ignore[arg-type]
    "a list of patterns": (lambda: Named(["a"]), TypeError, "a list of str is no pattern"),  # type: ignore[arg-type]
    "a sparsity as text": (lambda: Scored("element", "0.5"), TypeError, r"sparsity is '0.5' \(str\)"),  # type: ignore[arg-type]
    "a cut as text": (lambda: Depth("0.5"), ValueError, r"cut is '0.5' \(str\); one share in"),  # type: ignore[arg-type]
    "a scripted model": (
        of(torch.jit.script(nn.Linear(2, 2))),
        ValueError,
        "torch.jit.script returned, which takes no",
    ),
    "a traced model": (
        of(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))),
        ValueError,
        "the model is what torch.jit.trace returned, which takes no",
    ),
    "a model around a traced one": (
        of(nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))),
        ValueError,
        "0 is what torch.jit.trace returned, which takes no hooks: give SparseSAM the model itself",
    ),
    "an optimizer around one that averages models": (
        lambda: SparseSAM(m := small(), PostLocalSGDOptimizer(sgd(m), Averager())),
        ValueError,
        "is a PostLocalSGDOptimizer, which is around another optimizer .*: give the optimizer inside of it",
    ),
    "an optimizer in the backward": (of(stepped_in_backward("a closure")), ValueError, IN_BACKWARD),
    "an optimizer in the backward, bound": (of(stepped_in_backward("a method")), ValueError, IN_BACKWARD),
    "an optimizer in the backward, by torch": (of(stepped_in_backward("torch")), ValueError, IN_BACKWARD),
    "an optimizer in DDP's backward": (
        lambda: SparseSAM(m := small(), Overlapping(m.parameters(), lr=0.1)),
        ValueError,
        "Overlapping with overlap_with_ddp=True steps in the backward, which both passes run; use False",
    ),
    "blocks of something around stages": (
        lambda: optimizer(nn.Sequential(small_network("vit")), mask=Scored("block", 0.5)),
        ValueError,
        r"a mask of pattern 'block' runs parts of a StagedModel, and a Sequential is around it \(0\): give SparseSAM",
    ),
    "weights of 8 bits": (of(Eighth()), ValueError, "parameter w is torch.float8_e4m3fn, too narrow for sums"),
    "weights made for inference": (lambda: optimizer(for_inference()), ValueError, "was made in torch.inference_mode"),
    "a cut as a switch": (lambda: Depth(True), ValueError, r"cut is True \(bool\); one share in"),
    "a cut above 1": (lambda: Depth(1.5), ValueError, "one share in"),
    "three shares": (lambda: Depth((0.1, 0.2, 0.3)), ValueError, "one share in"),  # type: ignore[arg-type]
    "a cut without stages": (of(small(), mask=Depth()), ValueError, r"needs a model in stages.*stages_of\(model\)"),
    "a cut of one stage": (
        lambda: optimizer(staged(small()), mask=Depth(0.5)),
        ValueError,
        "needs a model in stages",
    ),
    "something around stages": (
        lambda: optimizer(nn.Sequential(small_network("vit")), mask=Depth()),
        ValueError,
        r"a Sequential is around it \(0\): give SparseSAM the StagedModel itself",
    ),
    "compiled stages": (
        lambda: optimizer(torch.compile(small_network("vit")), mask=Depth()),  # type: ignore[arg-type]
        ValueError,
        r"compile its stages instead: staged.compile\(\)",
    ),
    "complex weights": (of(Complex()), ValueError, "parameter w is torch.complex64; only real weights"),
    "sparse gradients": (
        of(nn.Sequential(nn.Embedding(4, 4, sparse=True))),
        ValueError,
        "0 is an Embedding with sparse gradients.*sparse=False",
    ),
    "a model on no device": (of(nn.Linear(2, 2, device="meta")), ValueError, "weight is on the meta device"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_one_sentence(case: str) -> None:
    make, kind, told = WRONG[case]
    with pytest.raises(kind, match=told) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_learning_rate_scheduler_may_have_the_base_optimizer_before() -> None:
    """It puts a function of its own in the place of the instance's `step`."""
    model = small()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.ExponentialLR(base, 0.5)
    assert SparseSAM(model, base).base_optimizer is base


def test_lazy_layers_are_run_first() -> None:
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"parameter 1.weight has no shape yet: run the model once"):
        refuse_unsupported(model)


def test_one_number_fixes_a_cut() -> None:
    assert Depth(0.5).cut == (0.5, 0.5)
    assert Depth(1).cut == (1.0, 1.0)


def test_options_cannot_be_set_without_an_effect_nor_radii_be_none() -> None:
    opt = optimizer()
    with pytest.raises(AttributeError, match=r'rho of a SparseSAM cannot be set: .* group\["rho"\] = '):
        opt.rho = 0.0
    for name, value in {"mask": Depth(0.5), "schedule": Interval(2), "direction": Fresh(0.5)}.items():
        with pytest.raises(AttributeError, match=f"{name} of a SparseSAM cannot be set: build a SparseSAM anew"):
            setattr(opt, name, value)
    for wrong in (-0.1, float("nan"), float("inf"), None, "0.1"):
        opt.param_groups[0]["rho"] = wrong
        with pytest.raises(
            (ValueError, TypeError), match=r"the rho of a parameter group is .*; a radius of at least 0"
        ):
            opt.step(loss_fn, BATCH)
        with pytest.raises((ValueError, TypeError), match="the rho of a parameter group is"):
            opt.plan  # noqa: B018
    with pytest.raises(AttributeError, match=r"base_optimizer of a SparseSAM cannot be set: build a SparseSAM anew"):
        opt.base_optimizer = sgd(small())
    opt = optimizer(schedule=lambda step, group: -1.0)
    with pytest.raises(ValueError, match=r"the schedule's factor in step 0 is -1.0; at least 0"):
        opt.step(loss_fn, BATCH)


CALLS: dict[str, tuple[Callable[[SparseSAM, nn.Module], Any], type[Exception], str]] = {
    "inputs and labels": (
        lambda opt, m: opt.step(loss_fn, *BATCH),
        TypeError,
        r"opt.step\(loss_fn, \(inputs, labels\)\)",
    ),
    "a loss": (
        lambda opt, m: opt.step(loss_fn(m, BATCH)),
        TypeError,
        r"given tensor\(.*; call opt.step\(loss_fn, batch",
    ),
    "no batch": (lambda opt, m: opt.step(loss_fn), TypeError, r"given loss_fn\(forward, batch\) and no batch for it"),
    "no batches": (lambda opt, m: opt.step(loss_fn, *[]), TypeError, "and no batch for it"),
    "a closure without backward": (
        lambda opt, m: opt.step(lambda: loss_fn(m, BATCH)),
        RuntimeError,
        "left no gradient",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_of_step_is_one_sentence_and_the_weights_stay(case: str) -> None:
    call, kind, told = CALLS[case]
    model = small()
    opt, before = optimizer(model), [p.detach().clone() for p in model.parameters()]
    with pytest.raises(kind, match=told) as caught:
        call(opt, model)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    opt.step(loss_fn, BATCH)


X, Y = BATCH
CUT: dict[str, tuple[Any, type[Exception], str]] = {
    "of a class that is no dictionary": (UserDict(x=X, y=Y), TypeError, r"in the batch is .* \(UserDict\): give its"),
    "with labels of NumPy": ((X, Y.numpy()), TypeError, r"in the batch is .* \(ndarray\)"),
    "of NumPy": (X.numpy(), TypeError, r"in the batch is .* \(ndarray\)"),
    "of a list of images": ((list(X), Y), ValueError, r"have the shapes \(3, 32, 32\), .*: put samples first"),
    "with weights of classes": (
        (X, Y, torch.ones(10)),
        ValueError,
        r"\(4, 3, 32, 32\), \(4,\), \(10,\): put samples first",
    ),
    "without a tensor": (3, TypeError, r"3 \(int\) has none"),
}


@pytest.mark.parametrize("case", CUT)
def test_a_batch_whose_first_samples_nobody_can_tell(case: str) -> None:
    batch, kind, told = CUT[case]
    with pytest.raises(kind, match=told):
        optimizer(direction=Fresh(0.5)).step(loss_fn, batch)


class Looked(nn.Module):
    """An embedding that is looked up sparsely, and a parameter of no elements."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.none = nn.Parameter(torch.randn(4, 3072)), nn.Parameter(torch.empty(0))
        self.head, self.sparse = nn.Linear(3072, 10), sparse

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(x + F.embedding(torch.arange(len(x)), self.table, sparse=self.sparse))


@pytest.mark.parametrize("mask", [None, Scored("row", 0.5)], ids=["all", "row"])
def test_sparse_gradients_of_functions_are_told_and_empty_parameters_count_for_nothing(mask: Any) -> None:
    opt = optimizer(Looked(True), mask=mask)
    with pytest.raises(ValueError, match=r"shape \(4, 3072\) got a sparse gradient.*call embedding with sparse=False"):
        opt.step(loss_fn, BATCH) if mask is None else opt.refresh(loss_fn, BATCH)
    for each in (mask, Scored("element", 0.5, score="weight", allocation="erk"), Scored("tensor", 0.5, score="weight")):
        opt = optimizer(Looked(False), mask=each)
        if opt.refresh_is_due:
            opt.refresh(loss_fn, BATCH)
        opt.step(loss_fn, BATCH)


def test_a_gradient_of_the_input_is_refused_behind_a_cut() -> None:
    def penalised(forward: Any, batch: Any) -> Tensor:
        loss = loss_fn(forward, batch)
        (slope,) = torch.autograd.grad(loss, batch[0], retain_graph=True)
        return loss + slope.pow(2).sum()

    batch = (BATCH[0].clone().requires_grad_(), BATCH[1])
    optimizer(small_network("resnet")).step(penalised, batch)
    with pytest.raises(ValueError, match=r"input requires a gradient of its own.* use a mask without a cut"):
        optimizer(small_network("resnet"), mask=Depth(0.5)).step(penalised, batch)


LOSSES: dict[str, tuple[Any, tuple[Any, ...], type[Exception], str]] = {
    "outputs and labels": (F.cross_entropy, (BATCH,), TypeError, r"cross_entropy\(input, target, .*takes outputs and"),
    "a criterion": (nn.CrossEntropyLoss(), (BATCH,), TypeError, r"CrossEntropyLoss\(input, target\) takes outputs and"),
    "x and y": (lambda x, y: x, (BATCH,), TypeError, r"<lambda>\(x, y\) takes outputs and labels"),
    "one argument": (lambda batch: batch, (BATCH,), TypeError, r"<lambda>\(batch\) does not take two arguments"),
    "three arguments": (lambda f, x, z: x, (BATCH,), TypeError, "does not take two arguments"),
    "a tensor": (torch.ones(()), (BATCH,), TypeError, r"the loss function is tensor\(1.\) \(Tensor\)"),
    "a tuple": (
        lambda f, b: (loss_fn(f, b), 1),
        (BATCH,),
        TypeError,
        "returned a tuple of Tensor, int.*nothing",
    ),
    "a number": (lambda f, b: loss_fn(f, b).item(), (BATCH,), TypeError, r"returned .* \(float\); the mean loss as a"),
    "a loss for each sample": (
        lambda f, b: F.cross_entropy(f(b[0]), b[1], reduction="none"),
        (BATCH,),
        ValueError,
        r"shape \(4,\); the mean over the batch",
    ),
    "a loss without a graph": (lambda f, b: loss_fn(f, b).detach(), (BATCH,), ValueError, "no trained weight by a"),
    "backward called": (
        lambda f, b: (loss := loss_fn(f, b)).backward() or loss,
        (BATCH,),
        ValueError,
        "calls backward itself",
    ),
}


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.filterwarnings("ignore:.*backward.*")
def test_a_wrong_loss_function_is_one_sentence_and_the_weights_stay(case: str) -> None:
    wrong, given, kind, told = LOSSES[case]
    model = small()
    opt, before = optimizer(model), [p.detach().clone() for p in model.parameters()]
    with pytest.raises(kind, match=told) as caught:
        opt.step(wrong, *given)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    opt.step(loss_fn, BATCH)  # and nothing is left of it


def test_the_methods_of_another_sam_are_named_with_what_is_in_their_place() -> None:
    opt = optimizer()
    for name in ("first_step", "second_step"):
        assert not hasattr(opt, name)
        with pytest.raises(AttributeError, match=rf"has no {name}: run the second pass in `with opt.perturbed\(\):`"):
            getattr(opt, name)
    with pytest.raises(AttributeError, match="object has no attribute 'third_step'"):
        opt.third_step()


def test_a_backward_before_a_closure_that_runs_it_too_is_dropped() -> None:
    """As in the closures of SAMs that have the first backward outside."""
    opt = optimizer(model := small())

    def closure() -> Tensor:
        loss = loss_fn(model, BATCH)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    closure()
    with pytest.raises(RuntimeError, match=r"drop a backward before opt.step\(closure\), which runs the cl"):
        opt.step(closure)
    opt.step(closure)


@pytest.mark.parametrize("before", [True, False])
def test_a_closure_that_does_nothing_is_told_for_what_it_is(before: bool) -> None:
    """Lightning gives `step` such a one, after `manual_backward`."""
    opt = optimizer(model := small())
    if before:
        loss_fn(model, BATCH).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=r"called no backward, as that of a LightningOptimizer .*use_pl_optimizer="):
        opt.step(lambda: None)


def test_gradients_that_a_hook_has_dropped_are_no_ascent() -> None:
    """No step of kind `dense` that is plain SGD in truth."""
    model = small()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.raises(RuntimeError, match=r"left no gradient of any perturbed weight: .* steps an optimizer in the b"):
        optimizer(model).step(loss_fn, BATCH)


def test_hooks_that_look_at_gradients_may_stay() -> None:
    model, seen = small(), []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    optimizer(model).step(loss_fn, BATCH)
    assert len(seen) == 8


def test_a_stage_before_a_cut_passes_on_a_tensor() -> None:
    model: Any = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.Linear(8, 8), nn.Linear(8, 10))

    def pair(x: Tensor) -> Any:
        return model[1](model[0](x)), x

    forwards: list[Any] = [pair, lambda both: (model[2](both[0]), both[1]), lambda both: model[3](both[0])]
    staged_model = StagedModel(model, [Stage(str(i), model[i], f) for i, f in enumerate(forwards, 1)])
    optimizer(staged_model).step(loss_fn, BATCH)
    with pytest.raises(TypeError, match="1, the last stage before a cut, passes on a tuple of Tensor; a tensor"):
        optimizer(staged_model, mask=Depth(0.2)).step(loss_fn, BATCH)


class TokensFirst(nn.Module):
    """A network whose blocks see tokens in the first dimension and samples in the second."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.embed, self.block, self.head = first, nn.Linear(48, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages():
            x = stage.forward(x)
        return x

    def tokens(self, x: Tensor) -> Tensor:
        x = self.embed(x.reshape(len(x), -1, 48))
        return x.transpose(0, 1) if self.first else x

    def out(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(0 if self.first else 1))

    def stages(self) -> list[Stage]:
        return [Stage("embed", self.embed, self.tokens), Stage("block", self.block, self.out, ("head",))]


def test_tokens_first_are_no_samples_also_where_they_are_as_many() -> None:
    images, labels = batches(1, 64)[0]  # of 64 patches
    for first in (True, False):
        model = TokensFirst(first)
        opt = optimizer(StagedModel(model, model.stages()), mask=Depth(0.5), direction=Fresh(0.5))

        def loss_of(forward: Any, batch: Any) -> Tensor:
            return forward(batch[0]).pow(2).mean()  # which has no labels that there are not as many of

        for _ in range(2):
            if first:
                with pytest.raises(ValueError, match=r"put out samples first, and for 32 samples .* \(64, 32, 8\)"):
                    opt.step(loss_of, (images, labels))
            else:
                opt.step(loss_of, (images, labels))
        assert len(opt._of_samples) == (0 if first else 1)


@pytest.mark.parametrize("form", ["by hand", "a closure", "a loss"])
def test_the_base_optimizer_steps_where_the_weights_are_not_perturbed(form: str) -> None:
    """Its step was undone without a word."""
    model = small()
    opt = optimizer(model)
    before = [p.detach().clone() for p in model.parameters()]

    def loss_of(forward: Any, batch: Any) -> Tensor:
        opt.base_optimizer.step()
        return loss_fn(forward, batch)

    def closure() -> Tensor:
        loss = loss_fn(model, BATCH)
        loss.backward()  # type: ignore[no-untyped-call]
        opt.base_optimizer.step()
        return loss

    def by_hand() -> None:
        loss_fn(model, BATCH).backward()  # type: ignore[no-untyped-call]
        with opt.perturbed():
            closure()

    step = {"by hand": by_hand, "a closure": lambda: opt.step(closure), "a loss": lambda: opt.step(loss_of, BATCH)}
    with pytest.raises(RuntimeError, match=r"base_optimizer.step was called where the weights are perturbed"):
        step[form]()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    opt.zero_grad()
    opt.step(loss_fn, BATCH)
    opt.base_optimizer.step()


def test_parameters_alone_take_closures_only() -> None:
    model = small()
    opt = SparseSAM(model.parameters(), sgd(model), rho=0.1)
    with pytest.raises(TypeError, match=r"was given parameters, .* give it the model, or use the form with a closure"):
        opt.step(loss_fn, BATCH)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_fn(model, BATCH)
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.report is not None
    assert opt.report.kind == "dense"


def test_a_copy_is_refused() -> None:
    opt = optimizer()
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled.*state_dict"):
            copied(opt)


def test_its_model_can_be_copied_and_pickled() -> None:
    model = small()
    opt = optimizer(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied(BATCH[0]).sum().backward()
        assert opt._first_forward.state is None  # the copy's forward is none of ours
        optimizer(copied).step(loss_fn, BATCH)


def test_a_step_of_the_base_optimizer_alone_says_so_once() -> None:
    model = small()
    opt = optimizer(model)
    loss_fn(model, BATCH).backward()
    with pytest.warns(UserWarning, match=r"without SAM: call opt.step\(loss_fn, batch\)") as caught:
        opt.step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(model, BATCH).backward()
        opt.step()
        other = SparseSAM(m := small(), sgd(m), rho=0.0)  # which is meant to be without
        loss_fn(m, BATCH).backward()
        other.step()
        opt = optimizer(model)
        loss_fn(model, BATCH).backward()
        with opt.perturbed():
            loss_fn(model, BATCH).backward()
        opt.step()


def wrapped_too_late(world: World, how: str) -> str:
    """What a rank is told whose model was wrapped after SparseSAM was built."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = small()
    base = sgd(model)
    opt = SparseSAM(model, base, rho=0.1)
    wrapper: nn.Module = model
    if how == "ddp":
        wrapper = DistributedDataParallel(model)
    elif how == "ddp around a module around it":
        wrapper = DistributedDataParallel(nn.Sequential(model))
    elif how.startswith("fully_shard"):
        fully_shard(model)
        if how == "fully_shard, the optimizer's weights replaced":  # as accelerate's `prepare` does
            base.param_groups[0]["params"] = list(model.parameters())
            base.state.clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss_fn(wrapper, BATCH).backward()
            with opt.perturbed():
                loss_fn(wrapper, BATCH).backward()
            opt.step()
    except ValueError as error:
        return str(error)
    return "; ".join(str(w.message) for w in caught) or f"trained on {type(opt.sharding).__name__}"


@pytest.mark.slow
def test_a_model_that_was_wrapped_too_late_is_told() -> None:
    for how, told in {
        "ddp": "the model was wrapped in DDP after SparseSAM was built from it",
        "ddp around a module around it": "the model was wrapped in DDP after SparseSAM was built from it",
        "fully_shard": "are not the model's: it was built over another model, or before weights of this one were",
        "fully_shard, the optimizer's weights replaced": "trained on FSDP2",
        "nothing": "this is one of 2 processes, and SparseSAM trains a model that no other shares",
    }.items():
        for said in run_ranks(2, wrapped_too_late, how):
            assert told in said, how


def prepared_by_accelerate(world: World) -> dict[str, str]:
    """What comes of accelerate's `prepare` for FSDP2 on a rank: how far weights are from plain FSDP2's after two steps.

    accelerate has FSDP2 on accelerators alone; on CPUs it is told after it has started, and what it does is the same.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import fully_shard

    data = batches(2, 4, seed=world.rank)

    def prepare(*parts: Any) -> Any:
        accelerator = Accelerator(cpu=True)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
        )
        return accelerator.prepare(*parts)

    def sam(model: nn.Module, base: Any) -> SparseSAM:
        return SparseSAM(model, base, rho=0.1, mask=Scored("element", 0.5, score="weight"))

    def steps(model: nn.Module, opt: SparseSAM) -> list[Tensor]:
        if opt.refresh_is_due:
            opt.refresh()
        for batch in data:
            opt.step(loss_fn, batch)
        return [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]

    def before(refreshed: bool) -> list[Tensor]:
        opt = sam(model := small(), sgd(model))
        if refreshed:
            opt.refresh()
        prepare(model, opt)
        return steps(model, opt)

    def after() -> list[Tensor]:
        model = small()
        model, base = prepare(model, sgd(model))
        return steps(model, sam(model, base.optimizer))

    plain = small()
    fully_shard(plain)
    expected = steps(plain, sam(plain, sgd(plain)))
    ways: dict[str, Callable[[], list[Tensor]]] = {
        "after": after,
        "before": lambda: before(False),
        "before, with a mask": lambda: before(True),
    }
    told = {}
    for way, train in ways.items():
        try:
            told[way] = str(max(float((a - b).abs().max()) for a, b in zip(train(), expected, strict=True)))
        except ValueError as error:
            told[way] = str(error)
        AcceleratorState._reset_state(reset_partial_state=True)
    return told


@pytest.mark.slow
def test_accelerates_fsdp2_is_plain_fsdp2_or_refused() -> None:
    for told in run_ranks(2, prepared_by_accelerate):
        assert told["after"] == told["before"] == "0.0"
        assert "the model was placed on FSDP2 after the mask was chosen" in told["before, with a mask"]
        assert (
            "prepare(model, base_optimizer)), and build SparseSAM from what comes of it" in told["before, with a mask"]
        )


def around(world: World) -> dict[str, str]:
    """What a rank is told of wrappers that hide others."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.net = inner

    sharded = small()
    fully_shard(sharded[1])
    made = {
        "around": Around(DistributedDataParallel(small())),
        "compiled": torch.compile(DistributedDataParallel(small())),
        "fsdp1": FullyShardedDataParallel(small(), device_id=torch.device("cpu")),
        "fsdp1 inside": Around(FullyShardedDataParallel(small(), device_id=torch.device("cpu"))),
        "a part": sharded,
    }
    told = {}
    for name, module in made.items():
        try:
            optimizer(module)  # type: ignore[arg-type]
            told[name] = "nothing"
        except ValueError as error:
            told[name] = str(error)
    return told


@pytest.mark.slow
def test_wrappers_that_hide_others_are_refused() -> None:
    for told in run_ranks(2, around):
        assert "a Around around DDP (net), which it hides: give SparseSAM the DistributedDataParallel" in told["around"]
        assert "OptimizedModule around DDP" in told["compiled"]
        assert "compile before it is wrapped: DistributedDataParallel(torch.compile(model))" in told["compiled"]
        assert "(FSDP1), which is not supported; call fully_shard" in told["fsdp1"]
        assert told["fsdp1 inside"] == told["fsdp1"]
        assert "submodule 1 is sharded by FSDP2 but the model itself is not" in told["a part"]


def test_a_stage_that_is_checkpointed_reentrantly_is_refused_behind_a_cut() -> None:
    from torch.utils.checkpoint import checkpoint

    def stages(model: Any, reentrant: bool) -> list[Stage]:
        def run(block: nn.Module) -> Callable[[Tensor], Tensor]:
            return lambda x: checkpoint(block, x, use_reentrant=reentrant)

        blocks = [Stage(str(i), model[i], run(model[i])) for i in (1, 2)]
        return [Stage("0", model[0], model[0]), *blocks, Stage("3", model[3], model[3])]

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Sequential(nn.Flatten(), nn.Linear(3072, 8)), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        )

    plain, same = model(), model()
    with pytest.raises(ValueError, match=r"no gradient flows through 2, .* use use_reentrant=False"):
        optimizer(StagedModel(plain, stages(plain, True)), mask=Depth(0.5)).step(loss_fn, BATCH)
    optimizer(StagedModel(plain := model(), stages(plain, False)), mask=Depth(0.5)).step(loss_fn, BATCH)
    whole = [Stage(str(i), same[i], same[i]) for i in range(4)]
    optimizer(StagedModel(same, whole), mask=Depth(0.5)).step(loss_fn, BATCH)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize("alone", ["a mask", "a radius", "another optimizer"])
def test_a_layer_that_is_checkpointed_reentrantly_is_refused_behind_what_is_left_alone(alone: str) -> None:
    """Its input has no gradient then, so that torch computes none of its weights: they were not perturbed."""
    from torch.utils.checkpoint import checkpoint

    class Network(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.middle, self.last = nn.Linear(3072, 8), nn.Linear(8, 8), nn.Linear(8, 10)
            self.reentrant = reentrant

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.middle, self.first(x.flatten(1)), use_reentrant=self.reentrant))  # type: ignore[no-any-return]

    def step(reentrant: bool, elide: bool = True) -> list[Tensor]:
        model = Network(reentrant)
        rest = [*model.middle.parameters(), *model.last.parameters()]
        groups = [{"params": list(model.first.parameters()), "rho": 0.0}, {"params": rest}]
        base = torch.optim.SGD(
            {"a mask": model.parameters(), "a radius": groups, "another optimizer": rest}[alone],  # type: ignore[arg-type]
            lr=0.1,
        )
        mask = Named("middle|last") if alone == "a mask" else None
        SparseSAM(model, base, rho=0.1, mask=mask, savings=Savings(elide=elide)).step(loss_fn, BATCH)
        return list(model.parameters())

    with pytest.raises(ValueError, match=r"a Linear is checkpointed reentrantly, .*: use use_reentrant=False"):
        step(True)
    if alone == "a mask":
        assert all(torch.equal(a, b) for a, b in zip(step(True, elide=False), step(False), strict=True))


def test_the_last_stage_may_pass_on_what_it_likes() -> None:
    model: Any = small()
    head = Stage("3", model[3], lambda x: {"logits": model[3](x)})  # type: ignore[arg-type, return-value]
    staged_model = StagedModel(model, [Stage("0", model[0], model[0]), Stage("1", model[1], model[1]), head])
    opt = optimizer(staged_model, mask=Depth(0.67))
    opt.step(lambda forward, batch: F.cross_entropy(forward(batch[0])["logits"], batch[1]), BATCH)
    assert opt.report is not None
    assert opt.report.plan.cut == 2


def test_what_a_loss_is_and_where_a_step_is() -> None:
    with pytest.raises(TypeError, match="of complex numbers; a real loss is needed"):
        optimizer().step(lambda forward, batch: loss_fn(forward, batch) * 1j, BATCH)
    opt = optimizer()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"the step is within torch\.inference_mode"):
        opt.step(loss_fn, BATCH)


MASKS: dict[str, Callable[[], Mask | None]] = {
    "all": lambda: None,
    "cut": lambda: Depth(0.5),
    "element": lambda: Scored("element", 0.5, score="weight"),
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_model_in_stages_takes_one_tensor(mask: str) -> None:
    opt = optimizer(small_network("vit"), mask=MASKS[mask]())
    if opt.refresh_is_due:
        opt.refresh()

    def wrong(forward: Any, batch: Any) -> Tensor:
        return F.cross_entropy(forward(batch[0], attention=batch[1]), batch[1])

    told = "a model that a mask cuts is in stages" if mask == "cut" else "unexpected keyword argument 'attention'"
    with pytest.raises((ValueError, TypeError), match=told):
        opt.step(wrong, BATCH)


# ---- scalers and graphs that a loss function takes into its own hands


def test_a_loss_function_that_keeps_its_graph_and_calls_backward_is_refused() -> None:
    def both(forward: Any, batch: Any) -> Any:
        loss = loss_fn(forward, batch)
        loss.backward(retain_graph=True)
        return loss

    with pytest.raises(ValueError, match="the loss function calls backward itself"):
        optimizer().step(both, BATCH)


@pytest.mark.parametrize("given", [False, True])
def test_a_loss_that_is_scaled_by_the_loss_function_is_refused(given: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    opt = optimizer(scaler=scaler) if given else optimizer()
    with pytest.raises(
        RuntimeError, match=r"the loss function scales its loss by a GradScaler.*SparseSAM\(…, scaler=scaler\)"
    ):
        opt.step(lambda forward, b: scaler.scale(loss_fn(forward, b)), BATCH)
    assert "scale" not in vars(scaler)


def test_a_closure_that_scales_by_a_scaler_that_was_not_given_is_refused() -> None:
    model = small()
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def closure() -> Any:
        opt.zero_grad()
        loss = loss_fn(model, BATCH)
        scaler.scale(loss).backward()
        return loss

    with pytest.raises(RuntimeError, match="the closure scales its loss by a GradScaler that SparseSAM was not given"):
        opt.step(closure)


def test_weights_before_a_cut_have_no_graph_to_differentiate_by() -> None:
    model = small_network("vit")
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), mask=Depth(0.5))

    def penalty(forward: Any, b: Any) -> Any:
        loss = loss_fn(forward, b)
        [g] = torch.autograd.grad(loss, [next(model.parameters())], create_graph=True)
        return loss + g.square().sum()

    with pytest.raises(ValueError, match="as they lie before the cut: use a mask without a cut"):
        opt.step(penalty, batches(1, 4)[0])


def test_reuse_by_hand_is_reuse_by_batches() -> None:
    ends = []
    for by_hand in (False, True):
        model = small_network("vit")
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        opt = SparseSAM(model, base, rho=0.1, schedule=Interval(2, reuse=0.7))
        for each in batches(4, 4):
            if not by_hand:
                opt.step(loss_fn, each)
                continue
            loss_fn(model, each).backward()
            with opt.perturbed():
                loss_fn(model, each).backward()
            opt.step()
            opt.zero_grad()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
