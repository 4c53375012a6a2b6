#!/usr/bin/env bash
# Train on a Slurm cluster:
#
#     sbatch slurm/imagenet_ssam.sh                                        configs/resnet50.yaml on 4 GPUs of one node
#     sbatch --nodes=2 --gpus-per-node=8 slurm/imagenet_ssam.sh configs/vit_b.yaml perturbation.rho=0.2
#     sbatch --gpus-per-node=0 slurm/imagenet_ssam.sh                      without GPUs, also where a node has some
#     bash slurm/sweep.sh                                                  methods times seeds, as an array of jobs
#
# Options of sbatch win over the lines below. --exclusive: loading takes all the cores there are, and step times are
# only comparable without neighbours. A job that reaches its time limit or is preempted is saved at the end of a step and
# queued again under the same id, as one is whose node fails, and goes on from where it was, or from at most ten minutes
# earlier, in checkpoints/slurm-<job id>; one that saves nothing new in two starts ends with the reason.
# `checkpoint.directory=checkpoints/slurm-123` lets a new job go on from an old one.
# Paths, the data's in the configuration too, are relative to the folder that sbatch was called in.
#
# NPROC_PER_NODE     processes per node, by default one per GPU; without GPUs one
# PYTHON             the interpreter, by default the one in this checkout's .venv; in a container the image's `python`
# LAUNCHER           torchrun (the default) or deepspeed, whose hostfile is then slurm-<job id>.hosts
# OMP_NUM_THREADS    of each process, by default its node's cores by the node's processes
# CONTAINER_IMAGE    run in this image: a file for Apptainer (*.sif), or what Pyxis takes (srun --container-image)
# CONTAINER_RUNTIME  apptainer or pyxis, where the image's name does not say it
# CONTAINER_MOUNTS   folders that the container shall see beside this checkout and the current one: /data,/scratch
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
# The id of an array's last task is also the name of all of them.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
of_job() { scontrol show job "$job" | sed -n "$1" | head -n 1; }

# What runs is a copy of this script in Slurm's spool, so the checkout is found by what was submitted.
here=slurm/imagenet_ssam.sh
root=$(of_job "s|^ *Command=\(.*\)/$here.*|\1|p")
[[ -e $root/launch/train.py ]] || root=${SLURM_SUBMIT_DIR:-$PWD}
[[ -e $root/launch/train.py ]] || die "submit $here where it lies in its checkout, or from the checkout's folder"
# GPUs that the job was given must be used, and none otherwise. train.device=auto is for GPUs that Slurm knows nothing of.
gpus=${SLURM_GPUS_ON_NODE:-0}
device=cuda
((gpus)) || device=cpu

# ------------------------------------------------------------------------------------------------------ the container

image=${CONTAINER_IMAGE:-}
runtime=${CONTAINER_RUNTIME:-}
case $image:$runtime in
    :?*) die "CONTAINER_RUNTIME=$runtime without a CONTAINER_IMAGE; name the image, or unset it" ;;
    *.sif:) runtime=apptainer ;;
    ?*:) runtime=pyxis ;;
    : | ?*:apptainer | ?*:pyxis) ;;
    *) die "CONTAINER_RUNTIME=$runtime: there are apptainer and pyxis" ;;
esac
step_options=() within=()
# What runs a command on a node: `step_options` are srun's, and `within` stands before the command.
in_container() {
    [[ -n $image ]] || return 0
    local folder mounts='' more=() folders=("$root" "$PWD")
    for folder in "${folders[@]}"; do
        [[ $folder != *[,:]* ]] || die "$folder: a folder that a container shall see has no comma or colon in its name"
    done
    [[ -z ${CONTAINER_MOUNTS:-} ]] || IFS=, read -ra more <<<"$CONTAINER_MOUNTS"
    for folder in "${folders[@]}" "${more[@]}"; do
        [[ $folder == *:* ]] || folder=$folder:$folder
        mounts+=${mounts:+,}$folder
    done
    if [[ $runtime == pyxis ]]; then
        step_options=("--container-image=$image" "--container-mounts=$mounts" "--container-workdir=$PWD")
        return
    fi
    command -v apptainer >/dev/null || die "CONTAINER_IMAGE=$image: there is no apptainer here; load its module first"
    [[ $image != *.sif || -e $image ]] || die "CONTAINER_IMAGE=$image: no such file; docs/cluster.md says how to build it"
    within=(apptainer exec --bind "$mounts" --pwd "$PWD")
    ((!gpus)) || within+=(--nv)
    within+=("$image")
}
in_container
if [[ -n $image ]]; then
    python=${PYTHON:-python}
else
    python=${PYTHON:-$root/.venv/bin/python}
    command -v "$python" >/dev/null || die "no Python at $python; run bash $root/launch/quickstart.sh once, or set PYTHON"
fi

# ----------------------------------------------------------------------------------------------------- the arguments

launcher=${LAUNCHER:-torchrun}
[[ $launcher == torchrun || $launcher == deepspeed ]] || die "LAUNCHER=$launcher: there are torchrun and deepspeed"
# A task of a sweep has its arguments in a file: of line N those of task N, one behind each tabulator.
if [[ -n ${SSAM_SWEEP:-} ]]; then
    [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || die "SSAM_SWEEP=$SSAM_SWEEP: only for a task of an array; bash slurm/sweep.sh"
    IFS=$'\t' read -ra task < <(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$SSAM_SWEEP")
    ((${#task[@]})) || die "$SSAM_SWEEP: has no line for task $SLURM_ARRAY_TASK_ID"
    set -- "${task[@]}"
fi
config=$root/configs/resnet50.yaml
if (($#)) && [[ $1 != *=* ]]; then
    config=$1
    shift
fi
arguments=(--config "$config" "train.device=$device" checkpoint.resume=auto
    "checkpoint.directory=checkpoints/slurm-$SLURM_JOB_ID" "$@")
# A checkpoint that was named is where the job began, and not where it is now.
if ((${SLURM_RESTART_COUNT:-0})); then
    arguments+=(checkpoint.resume=auto)
fi

# A mistake shows within seconds, once, and not on every process. A container of Pyxis's is a step.
check=("${within[@]}" "$python" "$root/launch/train.py" "${arguments[@]}" --print-config)
((!${#step_options[@]})) || check=(srun --nodes=1 --ntasks=1 "${step_options[@]}" "${check[@]}")
"${check[@]}" >/dev/null

processes=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}

# The processes meet at the first node, by the address that Slurm itself uses, at a port that jobs do not share.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(scontrol show node "${nodes[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
port=$((20000 + SLURM_JOB_ID % 20000))

printf 'job %s (start %d) on %s: %d node(s) x %d process(es) by %s, %d GPU(s) a node, %s%s\n' "$SLURM_JOB_ID" \
    "$((${SLURM_RESTART_COUNT:-0} + 1))" "$SLURM_JOB_NODELIST" "$SLURM_JOB_NUM_NODES" "$processes" "$launcher" "$gpus" \
    "$config" "${image:+, in $image by $runtime}"

if [[ $launcher == torchrun ]]; then
    launch=("$python" -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$processes"
        --rdzv-backend c10d --rdzv-endpoint "$address:$port" --rdzv-id "$SLURM_JOB_ID")
else
    # Slurm starts it on each node, where it would itself by ssh.
    hosts=$PWD/slurm-$SLURM_JOB_ID.hosts
    printf "%s slots=$processes\n" "${nodes[@]}" >"$hosts"
    ((gpus)) || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    launch=("$python" -m deepspeed.launcher.runner --no_ssh --node_rank @node_rank --hostfile "$hosts"
        --master_addr "$address" --master_port "$port")
fi

# ------------------------------------------------------------------------------------------------------- how it ends

queue_again() {
    scontrol requeue "$job" || printf 'it cannot be queued again: submit it once more by hand\n'
}
# Slurm sends SIGTERM to the processes of a job that is preempted, and not to this script.
preempted() { [[ -n $(of_job 's/.*PreemptTime=\([0-9][^ ]*\).*/\1/p') ]]; }

# Sent two minutes before the time limit: the processes save and end, however long a step takes, where after SIGTERM
# torchrun would kill them in 30 s. After 90 s the job is queued again in any case: at the limit it would be over.
limit=0
# shellcheck disable=SC2317,SC2329  # called by the trap
save() {
    ((limit)) && return
    limit=1
    printf 'job %s reaches its time limit: it is saved, and queued again\n' "$SLURM_JOB_ID"
    scancel --signal=USR1 "$job" || true
    { sleep 90 && queue_again; } &
}
trap save USR1

# On each node, whose cores may be others than the first's. The launcher, which USR1 would end, hears nothing of it.
# shellcheck disable=SC2016  # expanded by the inner bash
on_node='
    trap "" USR1
    processes=$1 cores=${SLURM_CPUS_ON_NODE:-1}
    shift
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
    printf "node %s: %d cores, %d threads a process\n" "${SLURMD_NODENAME:-}" "$cores" "$OMP_NUM_THREADS"
    exec "${@/#@node_rank/${SLURM_NODEID:-0}}"
'
# srun in the background, because bash handles signals only between commands and during `wait`. Without --cpus-per-task
# a step has all cores that the job has on a node, and a process may use all of them.
srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 "${step_options[@]}" \
    bash -c "$on_node" "$launcher" "$processes" "${within[@]}" "${launch[@]}" "$root/launch/train.py" "${arguments[@]}" &
step=$!
while true; do
    code=0
    wait "$step" || code=$?
    # A signal interrupts `wait` with a code above 128 while srun goes on.
    kill -0 "$step" 2>/dev/null || break
done
if ((code && !limit)) && preempted; then
    printf 'job %s is preempted: it is saved where a step ended in time, and queued again\n' "$SLURM_JOB_ID"
    limit=1
fi
if ((limit && code)); then
    queue_again
    sleep 60 # Slurm ends it
fi
exit "$code"
