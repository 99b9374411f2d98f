#!/usr/bin/env bash
# Make one virtual environment for each engine that scripts/benchmarks/bench_peers.py measures beside hf_sparse.
#   bash scripts/benchmarks/make_peers.sh DIR
# DeepSparse 1.8.0 is the last release with wheels, for Python 3.8 to 3.11, and under Neural Magic's community licence:
# it is a yardstick here, and nothing of hf_sparse uses it. An environment that is there already is kept.
set -euo pipefail
dir=${1:?bash scripts/benchmarks/make_peers.sh DIR}
unset PYTHONPATH PYTHONHOME

make() {
    local name=$1 python=$2
    shift 2
    if [[ -f $dir/$name/.done ]]; then
        echo "== $name is there"
        return
    fi
    if ! command -v "$python" >/dev/null; then
        echo "== $name left out: it needs $python" >&2
        return
    fi
    echo "== making $name: $*"
    rm -rf "${dir:?}/$name"
    "$python" -m venv "$dir/$name"
    "$dir/$name/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@"
    touch "$dir/$name/.done"
}

mkdir -p "$dir"
make onnxruntime "${PYTHON:-python3.11}" onnxruntime==1.32.0 onnx==1.23.2
make openvino "${PYTHON:-python3.11}" openvino==2026.4.1
make deepsparse "${PYTHON_DEEPSPARSE:-python3.11}" deepsparse==1.8.0 'numpy<2' 'setuptools<81'
