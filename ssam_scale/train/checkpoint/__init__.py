"""Checkpoints: the named parts of a run, each with `state_dict` and `load_state_dict`, in files that nothing unpickles.

    <directory>/epoch_0003/                 after 3 epochs
    <directory>/epoch_0003_step_001320/     within the epoch after that, after 1,320 steps since the run began
        state.json              what the run is, and `parts`: the state of each part but its tensors
        model.safetensors       weights and buffers under timm's names: timm loads this file as it is
        optimizer.safetensors   state of the base optimizer
        sparse.safetensors      mask, calibration, kept directions: see `SparseSAM.sparse`
        ema.safetensors         averaged weights, if there are any
        trajectory.safetensors  those that MESA goes by; what SAF remembers stays beside the checkpoints, in outputs/
        unrecorded.safetensors  within an epoch: losses since the last record, by process
        buffers.safetensors     within an epoch, of several processes: BatchNorm's statistics, by process

`build.Components.state` says which parts a run has. A part's state is made of dictionaries, lists, plain values and
tensors; each tensor goes to the part's safetensors file, and `{"$tensor": its name there}` takes its place in the JSON.
Tensors are full; or the checkpoint is sharded (`layout.py`): process 3 has written `model.rank_00003.safetensors`, flat
runs of sharded tensors, and the first process the others, too. A run goes on from either under another backend or
number of processes, and reads no more than it needs of a tensor (`saved.py`). No generator's state is among them: what
a step draws is a function of its place (`rng.seed_step`).

`state.json` is format 5 (`format`): the run's `model`, `method` and `optimizer`, which a run that goes on must have
too; its `config`; `classes`, their names by label, or none; `micro_batches`, how a step was shared out;
`evaluation`, if there was one of these weights; `files`, with `bytes` and `sha256` of each; `unbounded`, buffers that
need not be finite; `parts`. Of a sharded one, with each file `runs`: by tensor, where its run begins in the full one
and how long it is, or null for a full one; and `shapes`, by part and tensor, of the full ones. The first entry,
`sha256`, is the digest of all bytes that follow it. A checkpoint appears under its name only when the disk has it: it
is written beside it (`.….partial`) and renamed; one that is deleted is renamed first (`.….deleted`). One that a run has
left behind, because it went on from an earlier one, is called `….superseded`. `.lock` says which job is at work,
`.starts.json` where the last starts of a job began, and `.rollbacks.json` where the run has gone back to.
"""

from __future__ import annotations

from .files import consolidate
from .folder import check_fresh_directory, checkpoints, newest, resolve, set_aside
from .hook import SaveCheckpoint, save
from .lock import locked
from .parts import ModelState, OptimizerState, SparsePart, check_savable
from .rollbacks import Rollbacks, forget_rollbacks
from .starts import note_start
from .state import evaluation_of, finished, load, micro_batch_of, network_of, place_in_data

__all__ = [
    "ModelState",
    "OptimizerState",
    "Rollbacks",
    "SaveCheckpoint",
    "SparsePart",
    "check_fresh_directory",
    "check_savable",
    "checkpoints",
    "consolidate",
    "evaluation_of",
    "finished",
    "forget_rollbacks",
    "load",
    "locked",
    "micro_batch_of",
    "network_of",
    "newest",
    "note_start",
    "place_in_data",
    "resolve",
    "save",
    "set_aside",
]
