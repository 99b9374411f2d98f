"""One-shot pruning by llm-compressor beside ours: the same model, the same calibration tokens, the same windows.

    python scripts/reference/causal_peer.py tokens MODEL --calibration valid.txt --output tokens.json
    PEER/bin/python scripts/reference/causal_peer.py prune MODEL tokens.json --scorer sparsegpt --output pruned
    python scripts/reference/causal_peer.py score pruned --test test.txt

`prune` runs in an environment of its own with llm-compressor and without hf_sparse; it writes a dense model with zeros
in the type of the source. `tokens` and `score` run here, with the settings of causal_oneshot.py: the same samples (16
sequences of 512 tokens from random places, seed 0, BOS first) and windows (the first 12 of 512 tokens of the test).
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import time
from pathlib import Path
from typing import Any


def write_tokens(options: argparse.Namespace) -> None:
    """Write the calibration sequences of causal_oneshot.py."""
    from hf_sparse.hf.auto import load_tokenizer
    from hf_sparse.recipe.texts import TokenStream, read_text

    stream = TokenStream.of(read_text(options.calibration), load_tokenizer(options.model))
    samples = stream.samples(options.samples, options.length, options.seed)
    options.output.write_text(json.dumps([ids[0].tolist() for ids in samples]))


def prune(options: argparse.Namespace) -> None:
    """Prune with llm-compressor."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    peer: Any = importlib.import_module("llmcompressor")  # there in the other environment alone
    modifiers: Any = importlib.import_module("llmcompressor.modifiers.pruning")
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rows = json.loads(Path(options.tokens).read_text())
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    chosen: dict[str, Any] = {"sparsity": options.sparsity, "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    if options.pattern:
        chosen["mask_structure"] = options.pattern
    if options.scorer == "sparsegpt":
        chosen |= {"block_size": 128, "dampening_frac": 0.01}
    kind = {"sparsegpt": modifiers.SparseGPTModifier, "wanda": modifiers.WandaPruningModifier}[options.scorer]
    begin = time.process_time()
    peer.oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(options.model),
        dataset=data,
        recipe=kind(**chosen),
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    print(f"{options.scorer}: {time.process_time() - begin:.0f} CPU seconds", flush=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    zeros = [float((m.weight == 0).float().mean()) for n, m in model.named_modules() if n.endswith("_proj")]
    print(f"{len(zeros)} layers, {sum(zeros) / len(zeros):.4%} zeros")
    model.save_pretrained(options.output, save_compressed=False)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.output)


def score(options: argparse.Namespace) -> None:
    """Print the perplexity of a model."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_sparse.analysis.perplexity import mean_loss
    from hf_sparse.hf.auto import load_tokenizer
    from hf_sparse.recipe.texts import TokenStream, read_text

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    stream = TokenStream.of(read_text(options.test), load_tokenizer(options.model))
    windows = list(stream.windows(options.length, most=options.windows))
    print(f"perplexity {math.exp(mean_loss(model, windows)):.3f}  {options.model}")


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    tokens, pruning, scoring = verbs.add_parser("tokens"), verbs.add_parser("prune"), verbs.add_parser("score")
    for verb in (tokens, pruning, scoring):
        verb.add_argument("model")
    tokens.add_argument("--calibration", required=True)
    tokens.add_argument("--samples", type=int, default=16)
    tokens.add_argument("--seed", type=int, default=0)
    pruning.add_argument("tokens")
    pruning.add_argument("--scorer", choices=("sparsegpt", "wanda"), default="sparsegpt")
    pruning.add_argument("--sparsity", type=float, default=0.5)
    pruning.add_argument("--pattern", help="as in 2:4")
    for verb in (tokens, pruning):
        verb.add_argument("--output", required=True, type=Path)
    scoring.add_argument("--test", required=True)
    scoring.add_argument("--windows", type=int, default=12)
    for verb in (tokens, scoring):
        verb.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    {"tokens": write_tokens, "prune": prune, "score": score}[options.verb](options)


if __name__ == "__main__":
    main()
