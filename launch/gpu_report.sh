#!/usr/bin/env bash
# What a machine with a GPU has to show, in one command (some ten minutes on one card, no internet needed):
#
#     bash launch/gpu_report.sh                  into benchmarks/results/gpu-report
#     bash launch/gpu_report.sh FOLDER           into a folder of that name
#
# The tests that need a GPU; time and memory of a step by plan; images per second and model FLOPs utilisation beside timm's
# plain loop, with waits of the host and a profiler's trace; and `cost`'s prediction beside them. At real size: ResNet-50,
# ViT-B/16 and ConvNeXt-T, 224 pixels, bf16.
#
# It can be started again: what was finished is not done twice. A part that fails does not end the others; the report says
# so, and the exit code is 1 then.
#
# PYTHON      the interpreter, by default the one in this checkout's .venv
# MODELS      others than the three
# BATCH_SIZE  images of a step, 128 by default
# REPEATS     rounds of the measurements, 5 by default
set -uo pipefail

die() {
    printf 'gpu_report: %s\n' "$*" >&2
    exit 2
}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ $# -le 1 && ${1:-} != -* ]] || die "unknown arguments $*; the only one is a folder for the results"
out=${1:-$root/benchmarks/results/gpu-report}
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || die "no Python at $python; run bash launch/setup.sh once, or set PYTHON"
read -ra models <<<"${MODELS:-resnet50 vit_base_patch16_224 convnext_tiny}"
batch=${BATCH_SIZE:-128} repeats=${REPEATS:-5}
plans=(sam textbook 'cut 0.5' 'cut 0.75, fraction 0.5' 'moving cut' 'tensor 50%' 'row 50%' 'element 50%')

cd "$root" || die "cannot enter $root"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    die "torch sees no GPU here: nvidia-smi says whether there is one, ssam-scale bench measures a CPU"
mkdir -p "$out" || die "cannot write to $out"
out=$(cd "$out" && pwd)

failed=()
part() { # part NAME SECONDS COMMAND...: once, with its output in NAME.log
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    if [[ -e $out/$name.done ]]; then
        printf '%-12s done before\n' "$name"
        return
    fi
    if timeout -k 20 "$limit" "$@" >"$out/$name.log" 2>&1; then
        touch "$out/$name.done"
        printf '%-12s done in %d s\n' "$name" "$((SECONDS - started))"
    else
        failed+=("$name")
        printf '%-12s FAILED after %d s; the end of %s:\n' "$name" "$((SECONDS - started))" "$out/$name.log"
        tail -n 5 "$out/$name.log" | sed 's/^/    | /'
    fi
}

options=(--batch-size "$batch" --record "$out")
for model in "${models[@]}"; do options+=(--models "$model"); done
for plan in "${plans[@]}"; do options+=(--plans "$plan"); done

nvidia-smi >"$out/nvidia-smi.log" 2>&1 || true
# What a run with other models or sizes has done is not done for this one.
wanted="${models[*]} $batch $repeats"
[[ $(cat "$out/of.txt" 2>/dev/null) == "$wanted" ]] || rm -f "$out"/{steps,memory,throughput}.done
printf '%s\n' "$wanted" >"$out/of.txt"

part throughput 180 "$python" benchmarks/throughput.py --models "${models[@]}" --batch-size "$batch" \
    --repeats "$repeats" --output "$out"
part steps 180 "$python" -m ssam_scale bench steps "${options[@]}" --repeats "$repeats"
part gpu-tests 240 "$python" -m pytest -m gpu -q -p no:cacheprovider
part memory 180 "$python" -m ssam_scale bench memory "${options[@]}" --repeats 1

printf '\n%s\n' "$out:"
cat "$out"/throughput_*.md 2>/dev/null
((${#failed[@]} == 0)) || { printf 'failed: %s\n' "${failed[*]}" && exit 1; }
