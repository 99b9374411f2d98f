"""Write small checkpoints in the sparse formats of compressed-tensors, with the last version that could: 0.14.

hf_sparse does not need that package, and it was given up, so it gets an environment of its own:

    python3.11 -m venv /somewhere/legacy
    /somewhere/legacy/bin/pip install torch==2.13.0
    /somewhere/legacy/bin/pip install "compressed-tensors<0.15" transformers==4.57.6 safetensors==0.8.0 psutil
    /somewhere/legacy/bin/python scripts/tools/make_compressed_tensors_fixture.py tests/fixtures/compressed-tensors-0.14

Below OUTPUT it writes `sparse-bitmask` (two shards) and `sparse-24-bitmask`, and under `dense-bitmask` and `dense-24`
the same two models before they were compressed. The random numbers are torch's own, with a fixed seed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from transformers import BertConfig, BertModel, PreTrainedModel


def sparse_bert(two_of_four: bool, dtype: torch.dtype) -> PreTrainedModel:
    """Return a BERT with one layer, whose Linear weights have zeros: 80 % anywhere, or two of every four."""
    torch.manual_seed(0)
    # 36 is not a multiple of 8, so the rows of the bitmasks end in padding bits.
    sizes: dict[str, Any] = {
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
    }
    model = BertModel(BertConfig(vocab_size=40, max_position_embeddings=16, type_vocab_size=2, **sizes))
    torch.nn.Module.to(model, dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            rows, cols = module.weight.shape
            kept = torch.rand(rows, cols) < 0.2
            if two_of_four:
                kept = (torch.rand(rows, cols // 4, 4).argsort(-1) < 2).view(rows, cols)
            module.weight.data = torch.where(kept, module.weight.data, 0.0)
    return model


def main(output: Path) -> None:
    """Write the four folders."""
    for name, dense, config, dtype in (
        ("sparse-bitmask", "dense-bitmask", BitmaskConfig(targets=["Linear"]), torch.float32),
        ("sparse-24-bitmask", "dense-24", Sparse24BitMaskConfig(targets=["Linear"]), torch.bfloat16),
    ):
        model = sparse_bert(name == "sparse-24-bitmask", dtype)
        model.save_pretrained(output / dense)
        compressor = ModelCompressor.from_pretrained_model(model, config)
        assert compressor is not None
        compressor.compress_model(model)
        model.save_pretrained(output / name, max_shard_size="15KB" if dtype is torch.float32 else "1GB")
        compressor.update_config(str(output / name))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
