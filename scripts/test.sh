#!/usr/bin/env bash
# Check everything that a change must pass: format, lint, types, glossary, and the tests but for the slow ones.
#   bash scripts/test.sh [PYTEST ARGUMENT...]
# Needs Python >= 3.11 and pip; makes its own environment in .venv-test.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
unset PYTHONPATH PYTHONHOME

bash scripts/tools/make_venv.sh .venv-test '.[dev]'
bin=.venv-test/bin

echo "== ruff format"
"$bin/ruff" format --check .
echo "== ruff check"
"$bin/ruff" check .
echo "== mypy"
"$bin/mypy"
echo "== glossary"
"$bin/python" scripts/tools/check_words.py
echo "== pytest"
"$bin/python" -m pytest -n auto -m "not slow" "$@"
