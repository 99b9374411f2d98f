"""Peak memory of `hf-sparse convert` by origin: safetensors, `.bin` and GGUF of one model.

    python scripts/benchmarks/bench_import.py                   # a Qwen2 of 62 million parameters: half a minute

Each conversion runs in a process of its own. The peak is how far the resident memory rose above where it was before,
as the kernel counts it (Linux), after a tiny conversion, so that what is imported on the way is not counted. Pages of
mapped files count as long as they are resident.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from hf_sparse import import_checkpoint

SIZES: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}
TINY = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
LARGE = {"vocab_size": 16000, "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 7}


def write(folder: Path, sizes: dict[str, int]) -> int:
    """Write one model in all containers, and return the number of its parameters."""
    import gguf

    config = Qwen2Config(**{**SIZES, **sizes}, max_position_embeddings=64)
    model: Any = Qwen2ForCausalLM(config)
    model.save_pretrained(folder / "safetensors")
    (folder / "bin").mkdir()
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder / "bin")
    torch.save(model.state_dict(), folder / "bin" / "pytorch_model.bin")
    writer: Any = gguf.GGUFWriter(folder / "model.gguf", "qwen2")
    writer.add_name("random")
    writer.add_context_length(64)
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(sizes["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, sizes["num_hidden_layers"])
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        name: Any = names.get_name(key, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return int(model.num_parameters())


def memory(key: str) -> int:
    """Return a line of the kernel about this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def measure(source: Path, tiny: Path, output: Path) -> None:
    """Convert in this process, and print the peak as JSON."""
    torch.set_num_threads(1)
    import_checkpoint(tiny, output / "tiny")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    import_checkpoint(source, output / "large")
    print(json.dumps(memory("VmHWM") - before))


def main() -> None:
    """Print a line for each container."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("tiny", "large"):
            (folder / kind).mkdir()
        write(folder / "tiny", TINY)
        parameters = write(folder / "large", LARGE)
        print(f"{parameters / 1e6:.0f} million parameters, {parameters * 4 / 1e6:.0f} MB in float32")
        for container in ("safetensors", "bin", "model.gguf"):
            paths = [folder / "large" / container, folder / "tiny" / container, folder / f"out-{container}"]
            command = [sys.executable, __file__, "--measure", *map(str, paths)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peak = int(done.stdout.splitlines()[-1])
            print(f"{container}: peak {peak / 1e6:.0f} MB, {peak / (4 * parameters):.2f} of the model in float32")


if __name__ == "__main__":
    main()
