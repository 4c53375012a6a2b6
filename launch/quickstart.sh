#!/usr/bin/env bash
# From a fresh machine to a comparison: set-up, data, the base optimizer, dense SAM and SSAM on 2 processes, a table.
#
#     bash launch/quickstart.sh                      Fashion-MNIST
#     bash launch/quickstart.sh --data DIR           DIR/train and DIR/val, each with one folder of images per class
#     bash launch/quickstart.sh --short              the same path on a few hundred images
#     bash launch/quickstart.sh train.epochs=4       any overrides of configs/quickstart.yaml
#
# LAUNCHER=torchrun starts the processes with torchrun instead of deepspeed; PROCESSES is how many (default 2, or the
# number of GPUs if there is only one). Run it again to repeat the training; what is set up and written stays.
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | head -n -1; }
die() {
    printf 'quickstart: %s\n' "$*" >&2
    exit 2
}
say() { printf '\033[1m==> %s\033[0m\n' "$*"; }

short='' source='' overrides=()
while (($#)); do
    case $1 in
        --short) short=yes ;;
        --data)
            (($# > 1)) || die "--data needs a folder"
            source=$(realpath -m -- "$2")
            shift
            ;;
        --data=*) source=$(realpath -m -- "${1#*=}") ;;
        -h | --help)
            usage
            exit
            ;;
        -*) die "unknown option $1; there are --data DIR and --short" ;;
        perturbation=* | perturbation.mask=* | tracking.uri=* | tracking.experiment=* | tracking.group=* | \
            checkpoint.directory=*)
            die "$1: the quickstart sets ${1%%=*} itself, to compare the methods; use ssam-scale train for other runs"
            ;;
        *) overrides+=("$1") ;;
    esac
    shift
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for part in train val; do
    [[ -z $source || -d $source/$part ]] || die "--data $source: has no folder $part; expected train/ and val/ in it"
done
launcher=${LAUNCHER:-deepspeed}
[[ $launcher == deepspeed || $launcher == torchrun ]] || die "LAUNCHER=$launcher: there are deepspeed and torchrun"

bash launch/setup.sh
PATH=$PWD/.venv/bin:$PATH

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
# A container may have GPUs without that program. Hiding all of them asks for the CPU.
((gpus)) || gpus=$({ compgen -G '/dev/nvidia[0-9]*' || true; } | wc -l)
[[ -n ${CUDA_VISIBLE_DEVICES-all} ]] || gpus=0
processes=${PROCESSES:-$((gpus == 1 ? 1 : 2))}
cores=$(nproc)
# Each process would otherwise start as many threads as there are cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
((gpus)) || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}

# ------------------------------------------------------------------------------------------------------- what is trained

methods=(base sam ssam-element ssam-depth)
declare -A title=(
    [base]="the base optimizer" [sam]="dense SAM"
    [ssam-element]="SSAM, single weights by Fisher score" [ssam-depth]="SSAM, moving cut"
)
declare -A change=(
    [base]="perturbation=null" [sam]=$'perturbation.mask=null\nperturbation.rho=0.1'
    [ssam-element]=$'perturbation.mask={pattern: element, sparsity: 0.5, refresh_epochs: 5}\nperturbation.rho=0.1'
    [ssam-depth]="" # as configs/quickstart.yaml is
)
experiment=quickstart
folder=data/fashion-mnist
common=()
if [[ -n $source ]]; then
    folder=data/$(basename "$source" | tr -c '[:alnum:]._\n-' _)-$(printf '%s' "$source" | cksum | cut -d ' ' -f 1)
    experiment=quickstart-$(basename "$folder")
    classes=$(find "$source/train" -mindepth 1 -maxdepth 1 -type d | wc -l)
    (($(find "$source/train" -type f | head -n 2001 | wc -l) > 2000)) || common+=(data.subset=null)
    common+=(data.resolution=32 data.eval_resolution=32 "data.crop_scale=[0.5, 1.0]" "data.crop_ratio=[0.75, 1.333]")
    common+=("model.num_classes=$classes" "data.mean=[0.485, 0.456, 0.406]" "data.std=[0.229, 0.224, 0.225]")
fi
if [[ -n $short ]]; then
    folder=$folder-short
    experiment=$experiment-short
    common+=(data.subset=null train.epochs=1 schedule.warmup_epochs=0 data.batch_size=64 data.eval_batch_size=64 tracking.log_every=2 tracking.log_model=false)
fi
# Runs of an earlier quickstart are compared, too (another seed, say), but for those by other code, which cannot be.
code=$(git describe --always --dirty 2>/dev/null || ssam-scale --version | sed -n 1p)
common+=("data.train=$folder/train.beton" "data.val=$folder/val.beton")
common+=("tracking.experiment=$experiment" "tracking.group=by $code")

arguments_of() { # arguments_of METHOD: one a line
    local own=("checkpoint.directory=checkpoints/$experiment/$1")
    [[ -z ${change[$1]} ]] || mapfile -t -O 1 own <<<"${change[$1]}"
    local override
    for override in "${overrides[@]}"; do
        # The base optimizer has no perturbation; setting a part of it would give it one.
        [[ $1 == base && $override == perturbation.* ]] || own+=("$override")
    done
    printf '%s\n' --config configs/quickstart.yaml "${common[@]}" "${own[@]}"
}

# A mistake in an override shows now, not after the data is written.
for method in "${methods[@]}"; do
    mapfile -t arguments < <(arguments_of "$method")
    ssam-scale train --print-config "${arguments[@]}" >/dev/null
    ((${#overrides[@]})) || break
done

# ------------------------------------------------------------------------------------------------------------------ data

# Where the images lie as Debian's package has them: installed, or only unpacked here, for which nobody has to be root.
idx=/usr/share/datasets/fashion-mnist
unpack_fashion_mnist() {
    idx=$PWD/data/dataset-fashion-mnist$idx
    [[ ! -d $idx ]] || return 0
    local download="apt-get download dataset-fashion-mnist" within=$PWD/data/downloads
    say "Fetching Fashion-MNIST (Debian's package dataset-fashion-mnist, 31 MB)"
    mkdir -p "$within"
    { (cd "$within" && { $download || { ((EUID == 0)) && apt-get -q update && $download; }; }) >"$within/log" 2>&1 &&
        dpkg-deb --extract "$within"/dataset-fashion-mnist_*.deb data/dataset-fashion-mnist; } ||
        die "Fashion-MNIST could not be fetched ($(tail -n 1 "$within/log")); install dataset-fashion-mnist, or train on \
your own images: --data DIR"
    rm -r "$within"
}

if [[ -z $source ]]; then
    [[ -d $idx ]] || unpack_fashion_mnist
    say "Writing Fashion-MNIST to $folder"
    ssam-scale data fashion-mnist "$folder" --idx-folder "$idx" ${short:+--limit 512 --val-limit 256}
else
    mkdir -p "$folder"
    for part in train val; do
        if [[ -e $folder/$part.beton ]]; then
            say "Using $folder/$part.beton (remove it to have it written anew)"
        else
            say "Writing $source/$part to $folder/$part.beton"
            # The validation images may lack a class; they are numbered as the training images are.
            numbered=()
            [[ $part == train ]] || numbered=(--classes-of "$folder/train.beton")
            ssam-scale data write "$source/$part" "$folder/$part.beton" --max-resolution 256 ${short:+--limit 512} "${numbered[@]}"
        fi
    done
fi

# -------------------------------------------------------------------------------------------------------------- training

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

launch() { # launch ARGUMENT...: launch/train.py on all processes
    local port
    port=$(free_port)
    if [[ $launcher == deepspeed ]]; then
        # Not the script `deepspeed`: its first line names the interpreter, which must not have a space in its path.
        python -m deepspeed.launcher.runner --quiet --num_gpus "$processes" --master_addr 127.0.0.1 --master_port "$port" launch/train.py "$@"
    else
        torchrun --nproc_per_node "$processes" --master_addr 127.0.0.1 --master_port "$port" launch/train.py "$@"
    fi
}

started=$SECONDS
for number in "${!methods[@]}"; do
    method=${methods[number]}
    # The launcher only starts the processes; the backend is what the run's own first line says.
    say "Training $((number + 1)) of ${#methods[@]}: ${title[$method]} ($processes processes, started by $launcher)"
    mapfile -t arguments < <(arguments_of "$method")
    rm -rf "checkpoints/$experiment/$method" # of an earlier quickstart
    launch "${arguments[@]}"
done
say "Trained ${#methods[@]} times in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
ssam-scale compare --experiment "$experiment" --group "by $code"
