#!/usr/bin/env bash
# Make (or reuse) a virtual environment with hf_sparse installed from this tree.
#   bash scripts/tools/make_venv.sh [--newest | --newest-torch] DIR WHAT [PACKAGE...]
# WHAT is what pip installs, editable, as in '.[dev]'; each PACKAGE is added without its dependencies. Versions are those
# of constraints.txt; with --newest the newest releases with the torch of constraints.txt (a CPU build), with
# --newest-torch the newest torch too (on Linux several GB of CUDA libraries). The environment is kept until WHAT, the
# packages, pyproject.toml, constraints.txt, the C++ sources or the Python change; an incomplete one is made anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
unset PYTHONPATH PYTHONHOME

versions=pinned
case ${1:-} in
--newest | --newest-torch)
    versions=${1#--}
    shift
    ;;
esac
venv=$1 what=$2
shift 2

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "No Python >= 3.11 with venv among: ${PYTHON:-python3.11 python3 python3.12 python3.13}. Install one (Debian:" \
        "python3.11 and python3.11-venv), or name it: PYTHON=/path/to/python3 bash $0" >&2
    return 1
}

python=$(find_python)
stamp=$({
    "$python" -VV
    printf '%s\n' "$versions" "$what" "$@"
    cat pyproject.toml constraints.txt scripts/tools/make_venv.sh setup.py hf_sparse/kernels/build.py hf_sparse/kernels/csrc/*
} | sha256sum)

if [[ -f $venv/.stamp && $(<"$venv/.stamp") == "$stamp" ]]; then
    echo "== environment $venv is up to date"
    exit 0
fi

echo "== making environment $venv with $("$python" -V), $versions versions"
rm -rf "$venv"
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input --quiet)
constraints=(-c constraints.txt)
if [[ $versions == newest-torch ]]; then
    constraints=()
else
    # First and alone: a range such as torch>=2.13 would take the newest build, on Linux with several GB of CUDA libraries.
    "${pip[@]}" install "$(grep '^torch==' constraints.txt)"
    if [[ $versions == newest ]]; then
        grep '^torch==' constraints.txt >"$venv/torch.txt"
        constraints=(-c "$venv/torch.txt")
    fi
fi
"${pip[@]}" install "${constraints[@]}" -e "$what"
if (($# > 0)); then
    "${pip[@]}" install --no-deps "$@"
fi
printf '%s\n' "$stamp" >"$venv/.stamp"
