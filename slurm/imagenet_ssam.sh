#!/usr/bin/env bash
# Train on a Slurm cluster:
#
#     sbatch slurm/imagenet_ssam.sh                                        configs/resnet50.yaml on 4 GPUs of one node
#     sbatch --nodes=2 --gpus-per-node=8 slurm/imagenet_ssam.sh configs/vit_b.yaml perturbation.rho=0.2
#     sbatch --gpus-per-node=0 slurm/imagenet_ssam.sh                      without GPUs, also where a node has some
#
# Options of sbatch win over the lines below. --exclusive: loading takes all the cores there are, and step times are
# only comparable without neighbours. A job that reaches its time limit is saved at the end of a step and queued again under
# the same id, as one is whose node fails, and goes on from where it was, or from at most ten minutes earlier, in
# checkpoints/slurm-<job id>; one that saves nothing new in two starts ends with the reason.
# `checkpoint.directory=checkpoints/slurm-123` lets a new job go on from an old one.
# Paths, the data's in the configuration too, are relative to the folder that sbatch was called in.
#
# NPROC_PER_NODE  processes per node, by default one per GPU; without GPUs one
# PYTHON          the interpreter, by default the one in this checkout's .venv
#
#SBATCH --job-name=ssam
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%j.out
##SBATCH --partition=gpu
##SBATCH --account=project
##SBATCH --mem=0
set -euo pipefail

die() {
    printf 'imagenet_ssam: %s\n' "$*" >&2
    exit 2
}
[[ -n ${SLURM_JOB_ID:-} ]] || die "this is a job: sbatch slurm/imagenet_ssam.sh [CONFIG] [overrides...]"

# What runs is a copy of this script in Slurm's spool, so the checkout is found by what was submitted.
here=slurm/imagenet_ssam.sh
root=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s|^ *Command=\(.*\)/$here.*|\1|p")
[[ -e $root/launch/train.py ]] || root=${SLURM_SUBMIT_DIR:-$PWD}
[[ -e $root/launch/train.py ]] || die "submit $here where it lies in its checkout, or from the checkout's folder"
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || die "no Python at $python; run bash $root/launch/quickstart.sh once, or set PYTHON"

config=$root/configs/resnet50.yaml
if (($#)) && [[ $1 != *=* ]]; then
    config=$1
    shift
fi
# GPUs that the job was given must be used, and none otherwise. train.device=auto is for GPUs that Slurm knows nothing of.
gpus=${SLURM_GPUS_ON_NODE:-0}
device=cuda
((gpus)) || device=cpu
arguments=(--config "$config" "train.device=$device" checkpoint.resume=auto
    "checkpoint.directory=checkpoints/slurm-$SLURM_JOB_ID" "$@")
# A checkpoint that was named is where the job began, and not where it is now.
if ((${SLURM_RESTART_COUNT:-0})); then
    arguments+=(checkpoint.resume=auto)
fi

# A mistake shows within seconds, once, and not on every process.
"$python" "$root/launch/train.py" "${arguments[@]}" --print-config >/dev/null

processes=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
cpus=${SLURM_CPUS_ON_NODE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > processes ? cpus / processes : 1))}

# The processes meet at the first node, by the address that Slurm itself uses, at a port that jobs do not share.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
port=$((20000 + SLURM_JOB_ID % 20000))

printf 'job %s (start %d) on %s: %d node(s) x %d process(es), %d GPU(s) and %d cores a node, %s\n' "$SLURM_JOB_ID" \
    "$((${SLURM_RESTART_COUNT:-0} + 1))" "$SLURM_JOB_NODELIST" "$SLURM_JOB_NUM_NODES" "$processes" "$gpus" "$cpus" \
    "$config"

queue_again() {
    scontrol requeue "$SLURM_JOB_ID" || printf 'it cannot be queued again: submit it once more by hand\n'
}

# Sent two minutes before the time limit: the processes save and end, however long a step takes, where after SIGTERM
# torchrun would kill them in 30 s. After 90 s the job is queued again in any case: at the limit it would be over.
limit=0
# shellcheck disable=SC2317  # called by the trap
save() {
    ((limit)) && return
    limit=1
    printf 'job %s reaches its time limit: it is saved, and queued again\n' "$SLURM_JOB_ID"
    scancel --signal=USR1 "$SLURM_JOB_ID" || true
    { sleep 90 && queue_again; } &
}
trap save USR1

# srun in the background, because bash handles signals only between commands and during `wait`. torchrun, which USR1
# would end, hears nothing of it.
# shellcheck disable=SC2016  # expanded by the inner bash
srun --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=1 \
    bash -c 'trap "" USR1; exec "$@"' torchrun "$python" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$processes" \
    --rdzv-backend c10d --rdzv-endpoint "$address:$port" --rdzv-id "$SLURM_JOB_ID" \
    "$root/launch/train.py" "${arguments[@]}" &
step=$!
while true; do
    code=0
    wait "$step" || code=$?
    # A signal interrupts `wait` with a code above 128 while srun goes on.
    kill -0 "$step" 2>/dev/null || break
done
if ((limit && code)); then
    queue_again
    sleep 60 # Slurm ends it
fi
exit "$code"
