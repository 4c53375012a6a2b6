#!/usr/bin/env bash
# Everything ssam_scale needs on Debian or Ubuntu: system packages, a virtual environment, the package, FFCV.
#
#     bash launch/setup.sh          for using it
#     bash launch/setup.sh dev      for working on it: linters, pytest, and what the tests launch for real
#
# Safe to run again: what is there already is left alone, and with nothing to do it is done in a second.
# PYTHON names the interpreter that .venv is made from (3.10 or newer). A torch with GPU support that this interpreter
# has already is used and never replaced; so is any in .venv of a version that pyproject.toml takes. Where pip downloads
# from is pip's own business (pip config, PIP_* variables). Compilers, headers and libraries count wherever the compiler
# and pkg-config find them (CXX, CPATH, LIBRARY_PATH, PKG_CONFIG_PATH: conda, Spack, module files), and where all are
# there nobody has to be root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra=${1:-}
venv=$PWD/.venv
log=$PWD/.venv/setup.log
usual=2.13.0 # the torch that is installed where there is none
oldest=$(sed -n 's/^ *"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 2
}
[[ -z $extra || $extra == dev ]] || die "unknown argument $extra; the only one is: dev"

# quietly LABEL COMMAND...: one line with the elapsed time and what is going on now; the log's tail if it fails.
quietly() {
    local label=$1 started=$SECONDS now pid
    local telling='^ *(Progress|Downloading|Building|Installing|Collecting|Get:|Unpacking|Setting up) '
    local brief='s/^ +//; s/ from .*//; s/^Progress ([0-9]+)[0-9]{6} of ([0-9]+)[0-9]{6}$/\1 of \2 MB/'
    shift
    printf '\n### %s: %s\n' "$label" "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null &
    pid=$!
    trap 'kill "$pid" 2>/dev/null' EXIT
    while [[ -t 1 ]] && kill -0 "$pid" 2>/dev/null; do
        now=$(tail -n 40 "$log" | grep -aE "$telling" | tail -n 1 | tr -d '\r\t' | sed -E "$brief" || true)
        printf '\r\033[K    %s  %d s  %.70s' "$label" "$((SECONDS - started))" "$now"
        sleep 1
    done
    [[ -t 1 ]] && printf '\r\033[K'
    if wait "$pid"; then
        trap - EXIT
        printf '    %s: done in %d s\n' "$label" "$((SECONDS - started))"
    else
        trap - EXIT
        printf '    %s: FAILED, the end of %s:\n' "$label" "$log" >&2
        tail -n 25 "$log" | sed 's/^/    | /' >&2
        return 1
    fi
}

# ---------------------------------------------------------------------------------------------------------- the Python

recent_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        recent_enough "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.10 or newer that runs"
        python=$PYTHON
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 /usr/bin/python3; do
        if recent_enough "$candidate"; then
            python=$(command -v "$candidate")
            return
        fi
    done
    python=
}

# ------------------------------------------------------------------------------------------------------ system packages

missing=()
lacks() { # lacks PACKAGE TEST...: unless the test succeeds, the package is missing
    local package=$1
    shift
    "$@" >/dev/null 2>&1 || missing+=("$package")
}
any_command() {
    local name
    for name; do command -v "$name" && return; done
    return 1
}
compiler=${CXX:-g++}
# Where headers may lie besides the compiler's own folders: as OpenCV's do, and those of an active conda environment.
header_folders() { # one -I a line
    local folder
    printf -- '-I%s\n' /usr/include/opencv4 ${CONDA_PREFIX:+"$CONDA_PREFIX/include" "$CONDA_PREFIX/include/opencv4"}
    while IFS= read -r -d : folder; do
        [[ -z $folder ]] || printf -- '-I%s\n' "$folder/opencv4"
    done <<<"${CPATH:-}:"
}
finds() { # finds HEADER: the compiler does; CXX may hold options too
    local folders
    mapfile -t folders < <(header_folders)
    # shellcheck disable=SC2086
    printf '#include <%s>\n' "$1" | $compiler -E -x c++ -o /dev/null "${folders[@]}" -
}
# What FFCV is compiled with; one that is compiled needs no headers any more, which takes seconds to find out.
ffcv_is_there() { "$venv/bin/python" -c 'import ffcv'; }
turbojpeg() { pkg-config --exists libturbojpeg || finds turbojpeg.h || ffcv_is_there; }
opencv() { pkg-config --exists opencv4 || finds "opencv2/$1.hpp" || ffcv_is_there; }

list_missing() {
    missing=()
    local version=3 include
    if [[ -z $python ]]; then
        missing+=(python3 python3-venv python3-dev)
    else
        # Another interpreter (pyenv, conda) brings its own venv and headers; the distribution's are packages apart.
        [[ $("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))') == /usr/bin/python* ]] &&
            version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
        lacks "python$version-venv" "$python" -c 'import ensurepip, venv'
        lacks "python$version-dev" test -e "$include/Python.h"
    fi
    lacks g++ any_command "${compiler%% *}"
    lacks pkg-config any_command pkg-config
    lacks libturbojpeg0-dev turbojpeg
    lacks libopencv-core-dev opencv core
    lacks libopencv-imgproc-dev opencv imgproc
    [[ $extra == dev ]] || return 0
    lacks dataset-fashion-mnist compgen -G '/usr/share/datasets/fashion-mnist/*' # what tests train on
    lacks git any_command git
    lacks slurm-wlm any_command slurmctld /usr/sbin/slurmctld
    lacks munge any_command munged /usr/sbin/munged
    lacks debootstrap any_command debootstrap /usr/sbin/debootstrap
    lacks postgresql compgen -G '/usr/lib/postgresql/*/bin/pg_ctl'
    local chromium=chromium driver=chromium-driver
    [[ $distribution == *ubuntu* ]] && chromium=chromium-browser driver=chromium-chromedriver
    lacks "$chromium" any_command chromium chromium-browser google-chrome
    lacks "$driver" any_command chromedriver
}

distribution=$( # shellcheck source=/dev/null
    . /etc/os-release 2>/dev/null && printf '%s %s' "${ID:-}" "${ID_LIKE:-}"
) || distribution=unknown

system_packages() {
    find_python
    list_missing
    ((${#missing[@]})) || return 0
    if [[ $distribution != *debian* && $distribution != *ubuntu* ]] || ! command -v apt-get >/dev/null; then
        die "this is not Debian or Ubuntu, so install by hand what these Debian packages contain, then run this again:
    ${missing[*]}
as root with your distribution's packages; or without, with conda (cxx-compiler pkg-config libjpeg-turbo libopencv), Spack
or module files, whose folders CPATH, LIBRARY_PATH and PKG_CONFIG_PATH then name"
    fi
    local root=()
    if ((EUID != 0)); then
        if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
            root=(sudo -n)
        else
            die "system packages are missing and this user may not install them (docs/install.md has ways without root). \
Run this, then start again:
    sudo apt-get update && sudo apt-get install -y --no-install-recommends ${missing[*]}"
        fi
    fi
    say "Installing system packages: ${missing[*]}"
    log=$(mktemp)
    local apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -y -o "Dpkg::Lock::Timeout=300")
    # A third-party source that is down must not stop the installation of what the others have.
    quietly "package lists" "${apt[@]}" update || printf '    going on with the package lists that are there\n'
    quietly "packages" "${apt[@]}" install --no-install-recommends "${missing[@]}" || exit 1
    rm -f "$log"
    log=$venv/setup.log
    find_python
    [[ -n $python ]] || die "no Python 3.10 or newer was found; install one and name it: PYTHON=/path/to/python3 bash $0"
    list_missing
    ((${#missing[@]} == 0)) || die "still missing after the installation: ${missing[*]}"
}

# -------------------------------------------------------------------------------------------- the virtual environment

# What torch an interpreter has: its version, gpu or cpu, and where it lies; nothing where there is none.
torch_of() {
    "$1" -c 'import torch; v = torch.version; print(v.__version__, "gpu" if v.cuda or v.hip else "cpu", torch.__file__)' \
        2>/dev/null || true
}

gpu_torch() {
    local version build _
    read -r version build _ <<<"$(torch_of "$1")" || true
    [[ $build != gpu ]] || printf '%s\n' "$version"
}

numbers() { # numbers VERSION: its first two; what a vendor calls 2.10.0a0+4fa3 is a 2.10
    local major minor _
    IFS=. read -r major minor _ <<<"$1"
    printf '%d %d\n' "${major%%[!0-9]*}" "${minor%%[!0-9]*}"
}

too_old() { # too_old VERSION
    local major minor least_major least_minor
    read -r major minor <<<"$(numbers "$1")"
    read -r least_major least_minor <<<"$(numbers "$oldest")"
    ((major < least_major || (major == least_major && minor < least_minor)))
}

# A torch for GPUs that is not in .venv is never replaced; one that is too old is not used either.
refuse_old_gpu_torch() {
    local version build file
    read -r version build file <<<"$(torch_of "$1")" || true
    if [[ $build == gpu && $file != "$venv"/* ]] && too_old "$version"; then
        die "torch $version in ${file%/torch/__init__.py} is too old, $oldest or newer is needed; upgrade it, or name a \
Python without it: PYTHON=/path/to/python3"
    fi
}

make_venv() {
    local scripts=$venv/bin/activate
    if [[ -L $venv/bin/python || -e $venv/bin/python ]] && ! { "$venv/bin/python" -c pass &&
        { [[ ! -e $scripts ]] || grep -qF "$(realpath "$venv")" "$scripts"; }; } 2>/dev/null; then
        [[ -e $log ]] || die ".venv does not work here (moved, or its Python is gone) and was not made by this; remove it"
        say "Removing .venv: it does not work here any more (moved, or its Python is gone)"
        rm -rf "$venv"
    fi
    if [[ ! -e $venv/bin/python ]]; then
        local existing options=()
        refuse_old_gpu_torch "$python"
        existing=$(gpu_torch "$python")
        [[ -n $existing ]] && options=(--system-site-packages)
        say "Making a virtual environment in .venv from $python ($("$python" -V))"
        "$python" -m venv "${options[@]}" "$venv"
        if [[ -n $existing && -z $(gpu_torch "$venv/bin/python") ]]; then
            # $python is itself in a virtual environment, and --system-site-packages means the Python below that one.
            "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib")); print(sysconfig.get_path("platlib"))' |
                sort -u >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
            [[ -n $(gpu_torch "$venv/bin/python") ]] || die "the torch of $python cannot be used from a virtual environment"
        fi
    fi
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null
    # Older ones lack the progress that `quietly` shows, and cannot build the newest packages.
    quietly "pip" "$venv/bin/python" -m pip install --upgrade pip 'setuptools>=77' wheel || exit 1
}

pip_install() { # pip_install LABEL ARGUMENT...
    local label=$1
    shift
    quietly "$label" "$venv/bin/python" -m pip install --progress-bar raw "$@" || exit 1
}

# The requirements of pyproject.toml but torch and torchvision, one a line.
other_requirements() {
    "$venv/bin/python" - "$extra" <<'PYTHON'
import re
import sys
from pathlib import Path
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib
project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]


def with_extras(lines):
    """The lines; in place of this package with some of its extras, what those extras list."""
    for line in lines:
        if own := re.fullmatch(rf"{project['name']}\[(.+)\]", line):
            for extra in own[1].split(","):
                yield from with_extras(extras[extra.strip()])
        else:
            yield line


wanted = with_extras([*project["dependencies"], f"{project['name']}[{sys.argv[1] or 'train,zero'}]"])
apart = ("torch", "torchvision")
print(*[line for line in wanted if re.split(r"[^\w.-]", line)[0] not in apart], sep="\n")
PYTHON
}

has_nvidia_gpu() { nvidia-smi -L 2>/dev/null | grep -q GPU || compgen -G '/dev/nvidia[0-9]*' >/dev/null; }
# An image is built where no GPU is seen; NVIDIA's name their CUDA by this variable, as many module files do.
is_for_gpus() { [[ -n ${CUDA_VERSION:-} ]] || has_nvidia_gpu; }

# The release of torchvision that goes with a torch: 0.(N + 15) with 2.N. No other one can be told.
vision_of() {
    local major minor
    read -r major minor <<<"$(numbers "$1")"
    ((major != 2)) || printf '0.%d\n' "$((minor + 15))"
}

vision_there() {
    "$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torchvision"))' 2>/dev/null || true
}

# pip's sources may offer builds for CPUs only, a tenth of the size; which sources those are is the user's choice.
install_cpu_torch() {
    local torch=$1 vision=$2 pip=("$venv/bin/python" -m pip install --progress-bar raw)
    printf '    no NVIDIA GPU here: looking for a CPU build of torch\n'
    quietly "CPU torch" "${pip[@]}" "$torch+cpu" "$vision+cpu" 2>/dev/null && return
    quietly "CPU torch with the common torchvision" "${pip[@]}" --no-deps "$torch+cpu" "$vision" 2>/dev/null && return
    printf '    pip found none. The common build of %s may be the CUDA one, several GB.\n' "$torch"
    printf '    To get the small one, stop this (Ctrl-C) and name an index that has it in PIP_EXTRA_INDEX_URL.\n'
    return 1
}

# Any torch in the range is kept with the torchvision that goes with it, and both are held by constraints: else one of
# the packages would bring another torchvision, which replaces the torch, on a CPU by a CUDA build.
install_python_packages() {
    local version build file vision
    refuse_old_gpu_torch "$venv/bin/python"
    read -r version build file <<<"$(torch_of "$venv/bin/python")" || true
    if [[ -z $version ]] || too_old "$version"; then
        say "Installing torch and torchvision"
        vision=torchvision==$(vision_of "$usual").0
        is_for_gpus || install_cpu_torch "torch==$usual" "$vision" || true
        pip_install "torch" "torch==$usual" "$vision"
        read -r version build file <<<"$(torch_of "$venv/bin/python")" || true
        [[ -n $version ]] || die "the torch that was installed cannot be imported: $venv/bin/python -c 'import torch'"
    else
        say "Keeping torch $version from ${file%/torch/__init__.py}"
        if [[ $build == cpu ]] && has_nvidia_gpu; then
            printf '    note: it is a build for the CPU. To use the GPU of this machine, remove .venv and run this again\n'
        fi
        vision=$(vision_of "$version")
        if [[ -n $vision && $(vision_there) != "$vision".* ]]; then
            pip_install "torchvision for torch $version" --no-deps "torchvision==$vision.*"
        fi
    fi
    printf 'torch==%s\n' "$version" >"$venv/constraints.txt"
    vision=$(vision_there)
    [[ -z $vision ]] || printf 'torchvision==%s\n' "$vision" >>"$venv/constraints.txt"
    say "Installing what ssam_scale is built on"
    other_requirements >"$venv/requirements.txt"
    pip_install "packages" -r "$venv/requirements.txt" -c "$venv/constraints.txt"
    install_ffcv
    # Without its dependencies, which are there: pip would look at torch's again.
    pip_install "ssam_scale" --no-deps --no-build-isolation -e .
}

# FFCV's declared dependencies bring a second OpenCV and more that it never imports; pyproject.toml lists what it does.
install_ffcv() {
    ffcv_is_there 2>/dev/null && return
    local paths=${PKG_CONFIG_PATH:-} shim
    # FFCV asks pkg-config only, and for the whole of OpenCV (libopencv-dev, 700 MB with all it depends on), of which it
    # uses two parts (50 MB). So pkg-config is told of what the compiler finds by itself, and that the two are the whole;
    # in /tmp, because FFCV's build splits folders at spaces.
    shim=$(mktemp -d /tmp/for-ffcv.XXXXXX)
    knows() { # knows PACKAGE LIBRARIES FOLDERS
        printf 'Name: %s\nDescription: as the compiler finds it\nVersion: 4\n' "$1"
        printf 'Libs: %s%s\nCflags: %s%s\n' "${CONDA_PREFIX:+-L$CONDA_PREFIX/lib }" "$2" "$3" "$(header_folders | tr '\n' ' ')"
    }
    if ! pkg-config --exists opencv4; then
        mkdir -p "$shim/include/opencv2"
        printf '#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' >"$shim/include/opencv2/opencv.hpp"
        knows OpenCV "-lopencv_imgproc -lopencv_core" "-I$shim/include " >"$shim/opencv4.pc"
    fi
    pkg-config --exists libturbojpeg || knows TurboJPEG -lturbojpeg "" >"$shim/libturbojpeg.pc"
    PKG_CONFIG_PATH=$shim${paths:+:$paths} pip_install "FFCV (is compiled)" --no-deps ffcv==1.0.2
    rm -rf "$shim"
}

# ---------------------------------------------------------------------------------------------------------------------

system_packages

# The folder belongs to the key because a virtual environment does not survive being moved. What was set up for
# development serves for use.
if [[ -L $venv ]]; then # a link belongs to another checkout, and so does what is in it
    "$venv/bin/python" -c pass || die ".venv is a link to $(readlink "$venv"), where there is no Python"
    exit 0
fi
key=$(cat pyproject.toml launch/setup.sh <(printf '%s' "$(realpath -m "$venv")") | sha256sum | cut -d ' ' -f 1)
if [[ -e $venv/.setup-$key-dev || -e $venv/.setup-$key-$extra ]] && "$venv/bin/python" -c pass 2>/dev/null; then
    exit 0
fi
mkdir -p "$venv"
make_venv
install_python_packages
rm -f "$venv"/.setup-*
touch "$venv/.setup-$key-$extra"
say "Set up in $venv"
