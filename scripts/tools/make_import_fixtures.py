"""Write small checkpoints with the programs that people pruned with, and the logits of those programs.

hf_sparse needs none of them, and some were given up, so they get an environment of their own:

    python3.11 -m venv /somewhere/t4
    /somewhere/t4/bin/pip install torch==2.13.0 safetensors==0.8.0 huggingface_hub==0.36.2 numpy regex requests pyyaml
    /somewhere/t4/bin/pip install --no-deps transformers==4.30.2 tokenizers==0.13.3
    /somewhere/t4/bin/pip install --no-deps nn_pruning==0.1.2
    /somewhere/t4/bin/python scripts/tools/make_import_fixtures.py tests/fixtures/import --cofi FOLDER

FOLDER is a checkout of https://github.com/princeton-nlp/CoFiPruning (its code is run, not copied).
`neural-compressor` needs neural-compressor==2.6 (--no-deps, and what it imports: schema prettytable py-cpuinfo pandas
pillow deprecated opencv-python-headless scikit-learn six), `gguf` the package gguf: `--only NAME` there. Later versions
of transformers 4 cannot compute a layer without heads.

Each folder has `expected.safetensors`: `input_ids`, `attention_mask`, and the `logits` of the program.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SIZES: dict[str, Any] = {"vocab_size": 40, "max_position_embeddings": 16, "type_vocab_size": 2}


def expected(model: Any, folder: Path) -> None:
    """Write inputs and the logits of a model."""
    model.eval()
    inputs = torch.randint(5, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(inputs)
    mask[1, 6:] = 0
    with torch.no_grad():
        logits = model(input_ids=inputs, attention_mask=mask)[0]
    save_file({"input_ids": inputs, "attention_mask": mask, "logits": logits}, folder / "expected.safetensors")


def spread(model: Any, seed: int = 0) -> Any:
    """Give a model weights that are large enough for heads and layer norms to matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.ndim > 1 else 0.2
        values = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data = values + 1 if "LayerNorm.weight" in name or "layer_norm.weight" in name else values
    return model


def bert(layers: int = 3, heads: int = 12, **options: Any) -> Any:
    """Return a BERT for two classes."""
    library: Any = importlib.import_module("transformers")

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": heads, "num_hidden_layers": layers, "intermediate_size": 32}
    config = library.BertConfig(**{**SIZES, **sizes, **options}, num_labels=2)
    return spread(library.BertForSequenceClassification(config))


def pruned_heads(root: Path) -> None:
    """Transformers 4: three models whose heads `prune_heads` has removed, two of them as `.bin`, one sharded."""
    library: Any = importlib.import_module("transformers")

    model = bert()
    model.prune_heads({0: [8, 4, 7], 1: list(range(12))})
    model.save_pretrained(root / "pruned-heads-bert", safe_serialization=False)
    expected(model, root / "pruned-heads-bert")

    config = library.DistilBertConfig(
        vocab_size=40, max_position_embeddings=16, dim=32, n_heads=4, n_layers=2, hidden_dim=48, num_labels=2,

    )  # fmt: skip
    model = spread(library.DistilBertForSequenceClassification(config))
    model.prune_heads({0: [3, 1], 1: [0]})
    model.save_pretrained(root / "pruned-heads-distilbert", safe_serialization=True)
    expected(model, root / "pruned-heads-distilbert")

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
    roberta = library.RobertaConfig(**{**SIZES, **sizes, "max_position_embeddings": 20}, num_labels=2)
    model = spread(library.RobertaForSequenceClassification(roberta))
    model.prune_heads({1: [2, 0]})
    model.save_pretrained(root / "pruned-heads-roberta", safe_serialization=False, max_shard_size="20KB")
    expected(model, root / "pruned-heads-roberta")


def tied(root: Path) -> None:
    """Transformers 4: a masked language model whose `.bin` holds the tied weight under two names, and zeros (2:4)."""
    library: Any = importlib.import_module("transformers")

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
    model = spread(library.BertForMaskedLM(library.BertConfig(**SIZES, **sizes)))
    model.tie_weights()
    generator = torch.Generator().manual_seed(2)
    for module in model.bert.encoder.modules():
        if isinstance(module, torch.nn.Linear):
            rows, columns = module.weight.shape
            kept = (torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1) < 2).view(rows, columns)
            module.weight.data *= kept  # leaves -0.0, as programs do that multiply by a mask
    folder = root / "tied-2-4"
    model.save_pretrained(folder, safe_serialization=False)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    expected(model, folder)


def block_pruning(root: Path) -> None:
    """nn_pruning: its own step removes the heads whose rows are zero, neurons stay as zeros."""
    sys.modules.setdefault("sklearn", types.ModuleType("sklearn"))
    optimize_model = importlib.import_module("nn_pruning.inference_model_patcher").optimize_model

    model = bert(layers=12, heads=4, hidden_size=16, intermediate_size=24)
    generator = torch.Generator().manual_seed(3)
    for layer in model.bert.encoder.layer:
        own = layer.attention.self
        gone = torch.rand(4, generator=generator) < 0.5
        for head in gone.nonzero().flatten().tolist():
            for linear in (own.query, own.key, own.value):
                linear.weight.data[4 * head : 4 * head + 4] = 0
                linear.bias.data[4 * head : 4 * head + 4] = 0
        neurons = torch.rand(24, generator=generator) < 0.6
        layer.intermediate.dense.weight.data[neurons] = 0
        layer.intermediate.dense.bias.data[neurons] = 0
    model = optimize_model(model, "heads")
    model.save_pretrained(root / "nn-pruning", safe_serialization=False)
    expected(model, root / "nn-pruning")


def torch_prune(root: Path) -> None:
    """torch.nn.utils.prune, with its masks still beside the weights."""
    from torch.nn.utils import prune

    model = bert(layers=1, hidden_size=24, heads=4)
    for module in model.bert.encoder.modules():
        if isinstance(module, torch.nn.Linear):
            prune.l1_unstructured(module, "weight", amount=0.8)
    folder = root / "torch-prune"
    folder.mkdir(exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    expected(model, folder)


def cofi_code(checkout: Path) -> tuple[Any, Any]:
    """Return the class of CoFi and its utilities, made to run with the transformers that is installed."""
    import transformers.file_utils
    import transformers.modeling_utils
    import transformers.pytorch_utils as moved

    for name in ("hf_bucket_url", "cached_path"):  # for downloads, which are not needed
        setattr(transformers.file_utils, name, None)
    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        setattr(transformers.modeling_utils, name, getattr(moved, name))
    for name in ("datasets", "scipy", "evaluation"):  # imported, and not needed here
        module: Any = types.ModuleType(name)
        module.Dataset = object
        sys.modules.setdefault(name, module)
    sys.path.insert(0, str(checkout))
    cls = importlib.import_module("models.modeling_bert").CoFiBertForSequenceClassification
    return cls, importlib.import_module("utils.cofi_utils")


def cofi(root: Path, checkout: Path) -> None:
    """CoFi: heads, neurons, and in one of two models hidden dimensions and whole sub-blocks are removed."""
    library: Any = importlib.import_module("transformers")
    cls, utilities = cofi_code(checkout)

    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 12, "intermediate_size": 24}
    for name in ("cofi", "cofi-hidden"):
        config = library.BertConfig(**SIZES, **sizes, num_labels=2, do_layer_distill=True)
        config.architectures = ["CoFiBertForSequenceClassification"]
        model = spread(cls(config))
        generator = torch.Generator().manual_seed(4)
        heads = (torch.rand(12, 1, 4, 1, 1, generator=generator) < 0.6).float()
        heads[:, :, 0] = 1
        neurons = (torch.rand(12, 1, 1, 24, generator=generator) < 0.5).float()
        zs = {"head_z": heads, "intermediate_z": neurons}
        if name == "cofi-hidden":
            zs["hidden_z"] = (torch.arange(16) != 5).float()
            zs["mlp_z"] = torch.ones(12)
            zs["mlp_z"][3] = 0
        # Only what the config does not say is removed; weights of removed heads never reach the file.
        utilities.prune_model_with_z(zs, model)
        model.save_pretrained(root / name, safe_serialization=False)
        expected(model, root / name)


def cofi_masks(root: Path, checkout: Path) -> None:
    """CoFi in training: full weights beside their masks."""
    library: Any = importlib.import_module("transformers")
    cls, utilities = cofi_code(checkout)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 12, "intermediate_size": 24}
    model = spread(cls(library.BertConfig(**SIZES, **sizes, num_labels=2)))
    folder = root / "cofi-masks"
    model.save_pretrained(folder, safe_serialization=False)
    generator = torch.Generator().manual_seed(5)
    zs = {
        "head_z": (torch.rand(12, 1, 4, 1, 1, generator=generator) - 0.4).clamp(min=0),
        "head_layer_z": torch.rand(12, generator=generator) + 0.2,
        "intermediate_z": (torch.rand(12, 1, 1, 24, generator=generator) - 0.5).clamp(min=0) * 2,
        "mlp_z": torch.rand(12, generator=generator) + 0.2,
    }
    zs["head_z"][:, :, 0] = 0.7
    torch.save(zs, folder / "zs.pt")
    utilities.update_params(model, zs)
    utilities.prune_model_with_z(zs, model)
    expected(model, folder)


def neural_compressor(root: Path) -> None:
    """Intel Neural Compressor 2.6, the last with pruning: blocks of 4x1 by magnitude, over eight steps."""
    for name in ("pycocotools", "pycocotools.coco", "pycocotools.cocoeval", "pycocotools.mask"):  # of metrics, unused
        module: Any = types.ModuleType(name)
        module.COCO = module.COCOeval = module.Params = object
        sys.modules[name] = module
        setattr(sys.modules["pycocotools"], name.rpartition(".")[2], module)
    prepare = importlib.import_module("neural_compressor.compression.pruner").prepare_pruning
    settings = importlib.import_module("neural_compressor.training").WeightPruningConfig
    model = bert(layers=2, heads=4, hidden_size=32, intermediate_size=48)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    local = {
        "op_names": ["encoder.*"], "pattern": "4x1", "target_sparsity": 0.8, "pruning_type": "magnitude",
        "start_step": 1, "end_step": 5, "pruning_frequency": 1,
    }  # fmt: skip
    _ = prepare(model, settings([local]), optimizer)
    torch.manual_seed(6)
    for _ in range(8):
        model(input_ids=torch.randint(5, 40, (4, 8)), labels=torch.randint(0, 2, (4,)))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(root / "neural-compressor-4x1", safe_serialization=False)
    expected(model, root / "neural-compressor-4x1")


def gguf(root: Path) -> None:
    """GGUF: a Qwen2 with Q8_0 matrices, written by gguf-py; the logits are those of the dequantized weights."""
    import gguf as package
    import numpy as np

    library: Any = importlib.import_module("transformers")

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = library.Qwen2Config(
        vocab_size=48, intermediate_size=64, max_position_embeddings=64, tie_word_embeddings=True, **sizes
    )
    model = spread(library.Qwen2ForCausalLM(config))
    folder = root / "qwen2-gguf"
    folder.mkdir(exist_ok=True)
    writer = package.GGUFWriter(folder / "model-q8_0.gguf", "qwen2")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(48)
    names = package.get_tensor_name_map(package.MODEL_ARCH.QWEN2, 2)
    state = model.state_dict()
    for key, tensor in state.items():
        if key == "lm_head.weight":
            continue
        name: Any = names.get_name(key, try_suffixes=(".weight", ".bias"))
        values = tensor.numpy().astype(np.float32)
        if tensor.ndim > 1 and "embed" not in key:
            blocks = package.quantize(values, package.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, blocks, raw_dtype=package.GGMLQuantizationType.Q8_0)
            state[key].copy_(torch.from_numpy(package.dequantize(blocks, package.GGMLQuantizationType.Q8_0)))
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected(model, folder)


def main() -> None:
    """Write the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="tests/fixtures")
    parser.add_argument("--cofi", type=Path, help="checkout of CoFiPruning")
    parser.add_argument("--only", nargs="+", default=list(MAKERS), choices=list(MAKERS), help="some of them")
    options = parser.parse_args()
    for name in options.only:
        if "cofi" not in name:
            MAKERS[name](options.root)
        elif options.cofi is not None:
            MAKERS[name](options.root, options.cofi)


MAKERS: dict[str, Callable[..., None]] = {
    "pruned-heads": pruned_heads,
    "tied-2-4": tied,
    "nn-pruning": block_pruning,
    "torch-prune": torch_prune,
    "cofi": cofi,
    "cofi-masks": cofi_masks,
    "neural-compressor": neural_compressor,
    "gguf": gguf,
}

if __name__ == "__main__":
    main()
