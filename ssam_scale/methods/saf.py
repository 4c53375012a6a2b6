"""SAF: the outputs of each image stay near its own of some epochs ago (arXiv 2205.14083)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssam_scale.checks import check_number
from ssam_scale.config.trajectory_sections import SAFTrajectory
from ssam_scale.sharding import World

from .interface import TRAJECTORIES, Reference, TrainingRun, check_term, trajectory_loss
from .memory import OutputMemory

_LARGEST = float(np.finfo(np.float16).max)


class SAF:
    """Adds λ τ² KL(softmax(z'/τ) ‖ softmax(z/τ)) to the loss, z' being an image's own logits some epochs ago.

        saf = SAF("outputs", classes=10)

        def loss_fn(forward, batch):
            images, labels, *reference = batch
            logits = forward(images)
            loss = F.cross_entropy(logits, labels)
            return loss + saf.loss(logits, *reference) if reference else loss

        for epoch in range(90):
            saf.begin_epoch(epoch)
            for images, labels, indices in loader:  # which images of the data set they are
                opt.step(loss_fn, *saf.attach([(images, labels, indices)]))
                saf.after_step()
            saf.end_epoch()

    The outputs are remembered in files (`OutputMemory`), 2 bytes for each class and image in an epoch, from the first
    epoch on that is looked back to; each is under its epoch's crop and flip, as in the paper. Remembered is what the
    last pass of a step computed, over all of its images: the descent, at the perturbed weights if there are such.
    Images that an epoch has left out, as an incomplete last batch, have no term `lag_epochs` later. The authors' code
    keeps float32 in each process's memory, and there alone, so that on several processes most images are compared with
    nothing; here all processes share one memory, and their number changes nothing.

    Args:
        folder: where outputs are kept, the same for all processes, on a file system that all of them see.
        classes: logits of an image.
        weight: λ; 0.3 in the authors' notes for ImageNet.
        temperature: τ.
        lag_epochs: Ẽ, how many epochs ago.
        start_epoch: epochs of training before the term is at work. The authors' code, which counts from 0 and compares
            by >, begins one epoch later with the same number.
        world: the processes.
        elsewhere: further folders, where a run that is gone on with may have kept outputs.
        checkpoints: how many states that `state_dict` gave can be gone back to: what these need is kept.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: one is out of its range, or the term would begin before anything is remembered.
    """

    def __init__(
        self,
        folder: Path | str,
        classes: int,
        *,
        weight: float = 0.3,
        temperature: float = 5.0,
        lag_epochs: int = 3,
        start_epoch: int = 5,
        world: World | None = None,
        elsewhere: Sequence[Path] = (),
        checkpoints: int = 1,
    ) -> None:
        check_number("classes", classes, "at least 2", lambda count: count >= 2, whole=True)
        check_term(weight, temperature)
        check_number("lag_epochs", lag_epochs, "at least 1", lambda epochs: epochs >= 1, whole=True)
        check_number("checkpoints", checkpoints, "at least 1", lambda count: count >= 1, whole=True)
        enough = f"at least lag_epochs, {lag_epochs}, before which nothing is remembered,"
        check_number("start_epoch", start_epoch, enough, lambda epoch: epoch >= lag_epochs, whole=True)
        self._memory = OutputMemory(Path(folder), classes, world if world is not None else World(), elsewhere)
        self._classes, self._weight, self._temperature = classes, weight, temperature
        self._lag, self._start, self._checkpoints = lag_epochs, start_epoch, checkpoints
        self._epoch, self._within = -1, False
        self._tidied = False  # of the epoch that goes on: what nothing looks back to is gone
        self._saved: list[tuple[int, int]] = []  # first and last epoch that a saved state looks back to
        self._expected: dict[int, Tensor] = {}  # indices of the step's micro-batches, by identity
        self._outputs: dict[int, Tensor] = {}  # float16 [N, classes] on the device, by the same
        self._fetched: list[_Fetched] = []

    @property
    def _remembers(self) -> bool:
        return self._epoch >= self._start - self._lag

    def begin_epoch(self, epoch: int, step: int = 0) -> None:
        """See `Trajectory`.

        Raises:
            UserError: what was to be remembered of an earlier epoch is not there.
        """
        self._epoch, self._within, self._tidied = epoch, True, False
        self._expected, self._outputs, self._fetched = {}, {}, []
        if self._remembers:
            self._memory.begin(epoch, step)
        if epoch >= self._start:
            self._memory.open(epoch - self._lag)

    def attach(self, batches: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """See `Trajectory`; `indices` are int64 [N], in the memory of the host.

        Raises:
            ValueError: a micro-batch has no indices.
        """
        return [self._attached(*batch) for batch in batches] if self._remembers else [batch[:2] for batch in batches]

    def _attached(self, images: Any, targets: Any, *indices: Tensor) -> tuple[Any, ...]:
        if len(indices) != 1 or not isinstance(indices[0], Tensor) or indices[0].dtype != torch.int64:
            raise ValueError("SAF needs to know which images these are: a batch is (images, targets, indices int64)")
        self._expected[id(indices[0])] = indices[0]
        if self._epoch < self._start:
            return images, targets, Reference(None, None, indices[0])
        logits, known = self._memory.read(indices[0].cpu().numpy())
        device = targets.device
        then, mask = _to(device, torch.from_numpy(logits)), _to(device, torch.from_numpy(known))
        return images, targets, Reference(then.float(), mask.float(), indices[0])

    def loss(self, logits: Tensor, reference: Reference) -> Tensor:
        """See `Trajectory`; keeps the logits of a whole micro-batch, each pass of a step its own."""
        key = id(reference.indices)
        if key in self._expected:  # not of some samples, nor of one for itself, which have indices of their own
            self._outputs[key] = logits.detach().clamp(-_LARGEST, _LARGEST).to(torch.float16, copy=True)
        return self._weight * trajectory_loss(logits, reference, self._temperature)

    def after_step(self) -> None:
        """Remembers the step's outputs; those of the step before are written, which the host need not wait for.

        Raises:
            RuntimeError: no pass of the step has seen a whole micro-batch and called `loss` with it.
            UserError: an image comes twice in this epoch, or outputs cannot be written.
        """
        self._write()
        if self._expected.keys() != self._outputs.keys():
            raise RuntimeError(
                "SAF has not seen the outputs of a whole micro-batch of this step: the loss function is to call "
                "saf.loss(logits, reference) with what attach has added to the batch, in a pass over all of it"
            )
        self._fetched = [_Fetched(self._expected[key], logits) for key, logits in self._outputs.items()]
        self._expected, self._outputs = {}, {}

    def leave_out_step(self) -> None:
        """See `Trajectory`: nothing is remembered of its images in this epoch."""
        self._expected, self._outputs = {}, {}

    def end_epoch(self) -> None:
        """Writes what is left. Collective.

        Raises:
            UserError: an image has come twice in this epoch, or outputs of another process are not seen here.
        """
        self._within = False
        if self._remembers:
            self._write()
            self._memory.complete()

    def _write(self) -> None:
        if self._fetched and not self._tidied:
            # The state of the epoch before has been saved by now, if it is; a dry run, of one step, does not come here.
            needed = [(self._epoch - self._lag, self._epoch), *self._saved]
            self._memory.forget(self._epoch, {epoch for first, last in needed for epoch in range(first, last + 1)})
            self._tidied = True
        for fetched in self._fetched:
            self._memory.append(*fetched.arrays())
        self._fetched = []

    def state_dict(self) -> dict[str, Any]:
        """What is remembered where; the outputs themselves stay in their files.

        As long as `checkpoints` later states have not been asked for, files that this one needs are kept.
        """
        self._write()
        self._memory.flush()
        first = self._epoch + (not self._within) - self._lag
        if (saved := (first, self._epoch)) not in self._saved:
            self._saved = [*self._saved, saved][-self._checkpoints :]
        return {
            "epoch": self._epoch,
            "within": self._within,
            "saved": [list(each) for each in self._saved],
            "memory": self._memory.state_dict(first),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, on any number of processes.

        Raises:
            ValueError: files that it needs are not there any more.
        """
        self._memory.load_state_dict(state_dict["memory"])
        self._epoch, self._within = state_dict["epoch"], state_dict["within"]
        self._saved = [(first, last) for first, last in state_dict["saved"]]


class _Fetched:
    """Outputs on their way to the host's memory."""

    def __init__(self, indices: Tensor, logits: Tensor) -> None:
        self._indices, self._logits, self._copied = indices, logits, None
        if logits.device.type == "cuda":
            self._logits = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
            self._logits.copy_(logits, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
        """Indices and logits, once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._indices.cpu().numpy(), self._logits.numpy()


def _to(device: torch.device, tensor: Tensor) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def epochs_kept(lag: int, every: int, checkpoints: int) -> int:
    """The most epochs whose outputs are on disk at once.

    Those that the epoch that goes on looks back to, itself, and those that the kept checkpoints would look back to.

    Args:
        lag: how many epochs a term looks back.
        every: epochs between two checkpoints.
        checkpoints: how many are kept.
    """
    # What the newest checkpoint looks back to, what each older one does besides, and what has come since the newest.
    return lag + (checkpoints - 1) * min(lag, every) + min(every, lag + 1)


@TRAJECTORIES.register("saf", "each image's own outputs of some epochs ago (SAF)", "arXiv 2205.14083")
def build(section: SAFTrajectory, run: TrainingRun) -> SAF:
    """The term of the section `trajectory`."""
    return SAF(
        run.folder,
        run.classes,
        weight=section.weight,
        temperature=section.temperature,
        lag_epochs=section.lag_epochs,
        start_epoch=section.start_epoch,
        world=run.world,
        elsewhere=run.elsewhere,
        checkpoints=run.checkpoints,
    )
