#!/usr/bin/env bash
# Train methods times seeds on a Slurm cluster, as one array of jobs:
#
#     bash slurm/sweep.sh NAME [--option=value of sbatch...] [--methods LIST] [--seeds LIST] [CONFIG] [overrides...]
#     bash slurm/sweep.sh radius --nodes=2 --gpus-per-node=8 --methods base,sam,ssam-f --seeds 0,1,2 configs/vit_b.yaml
#     bash slurm/sweep.sh radius.yaml --nodes=2 --gpus-per-node=8
#
# The last is a file of `ssam-scale sweep` (docs/training.md, "Many runs"), which says methods, values and seeds itself.
# Each task is a job of slurm/imagenet_ssam.sh, with a folder of its own, checkpoints/NAME/METHOD-seed-N, and all are one
# group of MLflow's (tracking.group=NAME), which `ssam-scale compare` makes a table of. sweeps/NAME/tasks.txt says which
# task does what, and logs lie beside it. Started again under the same name, tasks go on from where they were.
#
# --methods  config (as the file says), base (no perturbation), and names that `ssam-scale methods` lists; by default
#            base,sam,config
# --seeds    by default 0,1,2
# --method   one more, by overrides: --method 'small: perturbation.rho=0.01; perturbation.norm=masked'
# --array-limit  how many tasks run at once
# --check    say what would be done, and submit nothing
#
# sbatch's options have the form --option=value. From the environment come PYTHON and all that slurm/imagenet_ssam.sh reads.
set -euo pipefail

die() {
    printf 'sweep: %s\n' "$*" >&2
    exit 2
}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || die "no Python at $python; run bash $root/launch/setup.sh once, or set PYTHON"

(($#)) || die "a name is needed: bash slurm/sweep.sh NAME [options] [CONFIG] [overrides...], or a sweep's FILE.yaml"
name=$1 file=
[[ $name != *.yaml && $name != *.yml ]] || file=$name name=$(basename "${name%.y*ml}")
[[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || die "$name: a sweep's name is of letters, digits, '.', '_' and '-'"
shift
methods=base,sam,config seeds=0,1,2 own=() options=() rest=() check='' at_once=''
value() { (($# > 1)) && [[ -n $2 ]] || die "$1 needs a value"; }
while (($#)); do
    case $1 in
        --methods | --seeds | --method | --methods=* | --seeds=* | --method=*)
            [[ -z $file ]] || die "${1%%=*}: $file says that itself"
            ;;&
        --methods=* | --seeds=* | --method=* | --array-limit=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in
        --methods | --seeds | --method | --array-limit)
            value "$@"
            case $1 in
                --methods) methods=$2 ;;
                --seeds) seeds=$2 ;;
                --method) own+=("$2") ;;
                *) at_once=$2 ;;
            esac
            shift
            ;;
        --check) check=yes ;;
        --array | --array=* | -a) die "$1: a sweep computes its array; --array-limit N says how many run at once" ;;
        --*=*) options+=("$1") ;;
        -*) die "$1: sbatch's options are given as --option=value here" ;;
        *) rest+=("$1") ;;
    esac
    shift
done
[[ -z $at_once || $at_once =~ ^[1-9][0-9]*$ ]] || die "--array-limit $at_once: a whole number from 1 on is needed"
[[ -z $file ]] || ((${#rest[@]} == 0)) || die "${rest[0]}: $file says that itself, by config: and overrides:"
config=$root/configs/resnet50.yaml
if ((${#rest[@]})) && [[ ${rest[0]} != *=* ]]; then
    config=${rest[0]}
    rest=("${rest[@]:1}")
fi
for override in "${rest[@]}"; do
    case $override in
        *$'\t'* | *$'\n'*) die "an override has a tabulator or a line's end in it: $override" ;;
        checkpoint.directory=* | tracking.group=* | train.seed=*) die "$override: a sweep sets ${override%%=*} itself" ;;
    esac
done

# Names of methods and the overrides that make them, in the same order.
names=() changes=()
IFS=, read -ra listed <<<"$methods"
for method in "${listed[@]}"; do
    names+=("$method")
    case $method in
        config) changes+=("") ;;
        base) changes+=("perturbation=null") ;;
        *) changes+=("perturbation=null;perturbation={preset: $method}") ;;
    esac
done
for method in "${own[@]}"; do
    [[ $method =~ ^[A-Za-z0-9][A-Za-z0-9._-]*: ]] || die "--method '$method': give 'NAME: OVERRIDE; OVERRIDE'"
    names+=("${method%%:*}")
    changes+=("${method#*:}")
done
((${#names[@]})) || die "--methods is empty"
[[ -z $(printf '%s\n' "${names[@]}" | sort | uniq -d) ]] || die "a method is named twice among ${names[*]}"
IFS=, read -ra numbers <<<"$seeds"
((${#numbers[@]})) || die "--seeds is empty"
for seed in "${numbers[@]}"; do
    [[ $seed =~ ^[0-9]+$ ]] || die "--seeds $seeds: whole numbers are needed, as in 0,1,2"
done
[[ -z $(printf '%s\n' "${numbers[@]}" | sort | uniq -d) ]] || die "--seeds $seeds: one is there twice"

# ---------------------------------------------------------------------------------------------------------- the tasks

if [[ -n $file ]]; then
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    table=$("$python" -m ssam_scale sweep "$file" --dry-run) || exit # a mistake shows now, and not in each task
    mapfile -t tasks <<<"$table"
    [[ -n $check ]] || mapfile -t tasks < <("$python" -m ssam_scale sweep "$file" --tasks)
else
    tasks=() table=$(printf '%-5s %-16s %-5s %s' task method seed folder)
    for i in "${!names[@]}"; do
        IFS=';' read -ra parts <<<"${changes[i]}"
        for seed in "${numbers[@]}"; do
            folder=checkpoints/$name/${names[i]}-seed-$seed
            words=("$config" "${rest[@]}")
            for part in "${parts[@]}"; do
                part=${part#"${part%%[![:space:]]*}"} part=${part%"${part##*[![:space:]]}"}
                [[ -z $part ]] || words+=("$part")
            done
            words+=("train.seed=$seed" "checkpoint.directory=$folder" "tracking.group=$name")
            if [[ $seed == "${numbers[0]}" ]]; then # a mistake shows now, and not in each task
                "$python" "$root/launch/train.py" --config "${words[@]}" --print-config >/dev/null
            fi
            table+=$'\n'$(printf '%-5d %-16s %-5s %s' "${#tasks[@]}" "${names[i]}" "$seed" "$folder")
            line=$(printf '%s\t' "${words[@]}")
            tasks+=("${line%$'\t'}")
        done
    done
fi
array=0-$((${#tasks[@]} - 1))${at_once:+%$at_once}
printf '%s\n' "$table"
submit=(sbatch "--array=$array" "--job-name=$name" "--output=sweeps/$name/slurm-%A_%a.out" "${options[@]}"
    "$root/slurm/imagenet_ssam.sh")
if [[ -n $check ]]; then
    printf '%q ' "${submit[@]}"
    printf '\n'
    exit
fi
mkdir -p "sweeps/$name"
printf '%s\n' "$table" >"sweeps/$name/tasks.txt"
# Of its own for each submission: tasks of an earlier one that wait in the queue still read theirs.
list=$(mktemp "$PWD/sweeps/$name/arguments.XXXXXX")
printf '%s\n' "${tasks[@]}" >"$list"
SSAM_SWEEP=$list "${submit[@]}"
