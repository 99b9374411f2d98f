#!/usr/bin/env bash
# Build the docstrings into pages to browse (pdoc); open DIR/index.html. A warning is an error.
#   bash scripts/tools/make_docs.sh [DIR] [MODULE...]        (runs/docs; hf_sparse and every module of it)
# Uses the environment of scripts/test.sh, or the Python that $PYTHON names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

python=${PYTHON:-.venv-test/bin/python}
output=${1:-runs/docs}
modules=("${@:2}")
if ((${#modules[@]} == 0)); then
    read -ra modules < <("$python" -c '
import pkgutil
import hf_sparse
found = [f"hf_sparse.{m.name}" for m in pkgutil.iter_modules(hf_sparse.__path__) if not m.name.startswith("_")]
print("hf_sparse", *found)')
fi

said=$(mktemp)
trap 'rm -f "$said"' EXIT
built=0
"$python" -m pdoc --docformat google --output-directory "$output" "${modules[@]}" 2>"$said" || built=$?
cat "$said" >&2
if ((built != 0)) || grep -q '^Warn' "$said"; then
    echo "== the pages could not be built without a warning, see above" >&2
    exit 1
fi
echo "== $output/index.html"
