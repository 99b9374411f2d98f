"""Write a small T5 with random weights and a byte tokenizer, for recipes that train one from nothing.

    python scripts/reference/make_t5.py runs/g2p/untrained

The layout is that of ByT5 (gated feed-forward layers, one token per byte) at 1/140 of ByT5-small's size, so that two
cores can train it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration


def make(folder: Path, seed: int = 0) -> int:
    """Write model and tokenizer into a folder, and return the number of parameters."""
    torch.manual_seed(seed)
    tokenizer = ByT5Tokenizer()
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "d_model": 192,
        "d_kv": 32,
        "d_ff": 384,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 6,
        "relative_attention_max_distance": 64,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    model = T5ForConditionalGeneration(T5Config(**sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{make(options.folder, options.seed):,} parameters in {options.folder}")


if __name__ == "__main__":
    main()
