#!/usr/bin/env bash
# Install the newest release of everything, torch included, run the fast tests, and report what broke.
#   bash scripts/tools/test_newest.sh [PYTEST ARGUMENT...]
# On Linux the newest torch brings several GB of CUDA libraries. Makes .venv-newest-torch and newest.log.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
unset PYTHONPATH PYTHONHOME

rm -rf .venv-newest-torch # what is newest changes; an old environment would hide it
bash scripts/tools/make_venv.sh --newest-torch .venv-newest-torch '.[dev]' || exit 1
bin=.venv-newest-torch/bin

echo "== newer than constraints.txt"
"$bin/python" -m pip --disable-pip-version-check list --format freeze | LC_ALL=C sort |
    LC_ALL=C comm -13 <(grep -v '^#' constraints.txt | LC_ALL=C sort) - | grep -iE '^(torch|transformers|accelerate|peft|datasets|safetensors|huggingface_hub|evaluate|bitsandbytes|numpy|tokenizers|onnx[a-z]*|jinja2|scipy)=='
echo "== pytest"
"$bin/python" -m pytest -n auto -m "not slow" "$@" >newest.log 2>&1
status=$?
grep -E '^(FAILED|ERROR)' newest.log
tail -1 newest.log
echo "== deprecated names (warnings that name hf_sparse)"
grep -E 'hf_sparse/.*(Deprecat|Future)Warning' newest.log | sort | uniq -c || echo none
exit "$status"
