"""Speed of compacted models against the dense baseline, next to the FLOP-implied speed-up. Interleaved.

    python scripts/benchmarks/bench_structure.py --gone 0.5 0.75 --threads 1 2 --shapes 1x128 8x128
    python scripts/benchmarks/bench_structure.py --beside    # also torch-pruning and ONNX Runtime, in the same rounds
    python scripts/benchmarks/bench_structure.py --t5 --modes dynamic static compiled

Weights are random, and so are the pruned heads and neurons: the same fraction in every layer, different ones in each.
All models of a case run once in each round. Ratios are taken within a round, so that other load on the machine affects
both sides.

`achieved` is the speed-up divided by the FLOP-implied speed-up: 1 = all that fewer operations can give. `same mode`
compares with the dense model in the same mode, `over plain` with the dense model that is not compiled.

Modes of a BERT: eager and sdpa (attention implementations), compiled (sdpa with torch.compile). Modes of a T5: dynamic
(the default cache), static (a static cache), compiled (static cache; encoder and decoder with torch.compile). A T5 is
timed as its encoder and as greedy decoding of 32 tokens. Its operations are counted by torch while it runs: the
encoder, the keys and values of the cross-attention once, each step of the decoder with the cache of that step, and the
LM head, which pruning heads and neurons does not shrink.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, CompileConfig, T5Config, T5ForConditionalGeneration

import hf_sparse
from hf_sparse.formats.structure import Edits
from hf_sparse.hf.export.exporter import export_model
from hf_sparse.modeling.architectures import find_sub_blocks
from hf_sparse.profiling.timer import interleave, quartiles

BERT_SHAPES: dict[str, dict[str, Any]] = {
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "minilm-l6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}
T5_SHAPES: dict[str, dict[str, Any]] = {
    "t5-small": {"d_model": 512, "num_layers": 6, "num_heads": 8, "d_ff": 2048, "d_kv": 64, "vocab_size": 32128},
    "tiny": {"d_model": 32, "num_layers": 1, "num_heads": 4, "d_ff": 64, "d_kv": 8, "vocab_size": 100},
}
BERT_MODES, T5_MODES = ("eager", "sdpa", "compiled"), ("dynamic", "static", "compiled")
PARTS = ("encoder", "generate")
STEPS = 32
"""Tokens that a T5 generates."""

Call = Callable[[], Any]


def compacted(dense: Any, gone: float) -> tuple[Any, Edits]:
    """Return a copy without this fraction of the heads and neurons of each layer, and its edits."""
    small = copy.deepcopy(dense)
    groups = [{"pattern": pattern, "sparsity": gone, "scorer": "magnitude"} for pattern in ("head", "neuron")]
    hf_sparse.sparsify(small, hf_sparse.SparsityConfig(groups=groups))
    return small, hf_sparse.compact(small)


def speed_up(baseline: list[float], other: list[float]) -> list[float]:
    """Return the quartiles of the speed-ups of the rounds."""
    return list(quartiles([slow / fast for slow, fast in zip(baseline, other, strict=True)]))


def row(case: dict[str, Any], times: list[float], left: float, same: list[float], plain: list[float]) -> dict[str, Any]:
    """Return the figures of a compacted model.

    Args:
        case: part, mode, threads, shape, fraction of heads and neurons that are gone.
        times: of the model; same, plain: of the dense model in the same mode, and not compiled.
        left: fraction of the operations.
    """
    speed_ups = {"same mode": speed_up(same, times), "over plain": speed_up(plain, times)}
    return {
        **case,
        "milliseconds": 1e3 * statistics.median(times),
        "dense_milliseconds": 1e3 * statistics.median(same),
        "share_of_multiplications": left,
        "speed_up": speed_ups,
        "achieved": {name: [value * left for value in values] for name, values in speed_ups.items()},
        "beside": {},
    }


def clock_of(options: argparse.Namespace) -> Callable[[], float]:
    """Return the function that reads the time."""
    return time.process_time if options.clock == "cpu" else time.perf_counter


def multiplications(model: nn.Module, batch: int, length: int) -> int:
    """Count the multiplications of the linear layers and of the two matmuls in each attention of a BERT."""
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            count += batch * length * module.weight.numel()
        count += 2 * batch * length * length * int(vars(module).get("all_head_size", 0))
    return count


def measure_bert(options: argparse.Namespace, threads: int, batch: int, length: int) -> Iterator[dict[str, Any]]:
    """Measure all modes and fractions of a BERT."""
    for mode in options.modes:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {**BERT_SHAPES[options.model_shape], "vocab_size": 1000}
        sizes["attn_implementation"] = "eager" if mode == "eager" else "sdpa"
        dense = BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()
        ids = torch.randint(0, 1000, (batch, length))
        for gone in options.gone:
            small, edits = compacted(dense, gone)
            left = multiplications(small, batch, length) / multiplications(dense, batch, length)
            models: dict[str, Any] = {"dense": dense, "small": small}
            if mode == "compiled":
                torch.compiler.reset()
                models = {"dense": torch.compile(dense), "small": torch.compile(small), "plain": dense}
            runs: dict[Any, Call] = {name: functools.partial(model, input_ids=ids) for name, model in models.items()}
            if options.beside and mode != "compiled":
                runs |= engines(dense, edits, ids, threads)
            times = interleave(runs, options.rounds, calls=options.repeats, clock=clock_of(options))
            case = {"part": "encoder", "mode": mode, "threads": threads, "shape": f"{batch}x{length}", "gone": gone}
            found = row(case, times["small"], left, times["dense"], times.get("plain", times["dense"]))
            others = {name: values for name, values in times.items() if name not in ("dense", "small", "plain")}
            found["beside"] = {name: speed_up(times["dense"], values) for name, values in others.items()}
            yield found


def engines(dense: Any, edits: Edits, ids: Tensor, threads: int) -> dict[str, Call]:
    """Return calls of torch-pruning's result with the same survivors, and of the dense model in ONNX Runtime."""
    calls: dict[str, Call] = {}
    if importlib.util.find_spec("torch_pruning") is not None:
        calls["torch-pruning"] = functools.partial(torch_pruned(dense, edits), input_ids=ids)
    if importlib.util.find_spec("onnxruntime") is not None:
        calls["onnxruntime dense"] = onnx_run(dense, ids, threads)
    return calls


def torch_pruned(dense: Any, edits: Edits) -> Any:
    """Remove the same heads and neurons with torch-pruning.

    Its functions for linear layers get the groups, instead of its dependency graph, so that the survivors are the same.
    """
    import torch_pruning

    model = copy.deepcopy(dense)
    cuts = {name: cut for _, name, cut in edits}
    for block in find_sub_blocks(model, "the comparison"):
        cut = cuts[block.name]
        removed = sorted(set(range(cut.before)) - set(cut.kept))
        rows = [group * block.size + index for group in removed for index in range(block.size)]
        for layer in block.inputs.values():
            torch_pruning.prune_linear_out_channels(layer, rows)
        torch_pruning.prune_linear_in_channels(block.output, rows)
    return model


def onnx_run(dense: Any, ids: Tensor, threads: int) -> Call:
    """Return a call of the dense model, fp32, in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        report = export_model(dense, "onnx", folder, batch=2, length=ids.shape[1])
        name = next(name for name in report.files if name.endswith(".onnx"))
        session = onnxruntime.InferenceSession(f"{folder}/{name}", options, providers=["CPUExecutionProvider"])
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    feed = {given.name: values[given.name].numpy() for given in session.get_inputs()}
    return lambda: session.run(None, feed)


def t5_call(model: Any, part: str, mode: str, ids: Tensor) -> Call:
    """Return the call of a T5 that is timed."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if mode == "compiled":
        model = copy.copy(model)  # shares the weights; only this one has a compiled encoder
        model._modules = {**model._modules, "encoder": torch.compile(model.encoder)}
    if part == "encoder":
        return lambda: model.get_encoder()(**inputs)
    settings: dict[str, Any] = {} if mode == "dynamic" else {"cache_implementation": "static"}
    if mode == "compiled":
        settings["compile_config"] = CompileConfig(fullgraph=False, mode="default")
        settings["compile_config"]._compile_all_devices = True  # by default, transformers does not compile on a CPU
    elif mode == "static":
        settings["disable_compile"] = True
    settings |= {"min_new_tokens": STEPS, "max_new_tokens": STEPS, "do_sample": False, "num_beams": 1}
    return lambda: model.generate(**inputs, **settings)


@torch.no_grad()
def operations(model: Any, part: str, ids: Tensor) -> int:
    """Count the multiplications and additions that a T5 executes."""
    model.set_attn_implementation("eager")  # the counter does not support the fused attention of a CPU
    with FlopCounterMode(display=False) as counter:
        t5_call(model, part, "dynamic", ids)()
    model.set_attn_implementation("sdpa")
    return int(counter.get_total_flops())


def measure_t5(options: argparse.Namespace, threads: int, batch: int, length: int) -> Iterator[dict[str, Any]]:
    """Measure all parts, modes and fractions of a T5; fraction 0 is the dense model."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**T5_SHAPES[options.model_shape], "attn_implementation": "sdpa"}
    sizes |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "feed_forward_proj": "relu"}
    dense = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    models = {0.0: dense, **{gone: compacted(dense, gone)[0] for gone in options.gone}}
    ids = torch.randint(2, dense.config.vocab_size, (batch, length))
    for part in options.parts:
        torch.compiler.reset()
        counts = {gone: operations(model, part, ids) for gone, model in models.items()}
        # The encoder has no cache: static is the same as dynamic there.
        modes = [mode for mode in options.modes if part == "generate" or mode != "static"]
        modes = modes if "dynamic" in modes else ["dynamic", *modes]
        runs = {(gone, mode): t5_call(model, part, mode, ids) for mode in modes for gone, model in models.items()}
        rounds = options.rounds if part == "generate" else 3 * options.rounds
        times = interleave(runs, rounds, calls=options.repeats, clock=clock_of(options))
        for (gone, mode), own in times.items():
            case = {"part": part, "mode": mode, "threads": threads, "shape": f"{batch}x{length}", "gone": gone}
            yield row(case, own, counts[gone] / counts[0.0], times[0.0, mode], times[0.0, "dynamic"])


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--t5", action="store_true", help="a T5 instead of a BERT")
    parser.add_argument("--model-shape", help="bert-base, minilm-l6 or tiny; with --t5: t5-small or tiny")
    parser.add_argument("--gone", nargs="+", type=float, default=[0.5, 0.75], help="fractions of heads and of neurons")
    parser.add_argument("--modes", nargs="+", help=f"of {', '.join(BERT_MODES)}; with --t5: {', '.join(T5_MODES)}")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of a T5")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=["1x128", "8x128"], help="batch x tokens")
    parser.add_argument("--rounds", type=int, default=9, help="the encoder of a T5 has three times as many")
    parser.add_argument("--repeats", type=int, help="calls per model and round (3; with --t5: 1)")
    parser.add_argument("--beside", action="store_true", help="measure torch-pruning and ONNX Runtime too")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: time of one thread")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and nothing else")
    options = parser.parse_args()
    shapes, modes = (T5_SHAPES, T5_MODES) if options.t5 else (BERT_SHAPES, BERT_MODES)
    options.model_shape = options.model_shape or next(iter(shapes))
    options.modes = options.modes or (["dynamic", "static"] if options.t5 else ["sdpa", "compiled"])
    options.repeats = (1 if options.t5 else 3) if options.repeats is None else options.repeats
    if options.model_shape not in shapes:
        parser.error(f"--model-shape must be one of {', '.join(shapes)}, got {options.model_shape}")
    if unknown := set(options.modes) - set(modes):
        parser.error(f"--modes must be some of {', '.join(modes)}, got {', '.join(sorted(unknown))}")
    if options.t5 and options.beside:
        parser.error("--beside measures a BERT: leave out --t5")
    if min(options.rounds, options.repeats, *options.threads) < 1:
        parser.error("--rounds, --repeats and --threads must be at least 1")
    if options.clock == "cpu" and max(options.threads) > 1:
        parser.error("--clock cpu needs --threads 1: the CPU time of two threads includes waiting")
    return options


def line(found: dict[str, Any]) -> str:
    """Return a row of the table."""
    cells = [found[key] for key in ("part", "mode", "threads", "shape")]
    cells += [f"{found['gone']:.2f}", f"{found['dense_milliseconds']:.1f}", f"{found['milliseconds']:.1f}"]
    cells.append(f"{1 / found['share_of_multiplications']:.2f}")
    for name, (low, median, high) in found["achieved"].items():
        cells += [f"{found['speed_up'][name][1]:.2f}", f"{median:.3f} ({low:.3f}-{high:.3f})"]
    others = [f"{name} {median:.2f} ({low:.2f}-{high:.2f})" for name, (low, median, high) in found["beside"].items()]
    return "| " + " | ".join(map(str, [*cells, ", ".join(others)])) + " |"


def main() -> None:
    """Measure and print."""
    options = parse()
    transformers.logging.set_verbosity_error()
    if not options.json:
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        print(f"{options.model_shape}, {versions}, {options.clock} clock\n")
        for package in ("torch-pruning", "onnxruntime"):
            if options.beside and importlib.util.find_spec(package.replace("-", "_")) is None:
                print(f"{package} is not installed and not measured: pip install {package}\n")
        print("| part | mode | threads | shape | gone | dense ms | ms | FLOP-implied | same mode: speed-up | achieved "
              "(quartiles) | over plain: speed-up | achieved (quartiles) | beside: speed-up (quartiles) |")  # fmt: skip
        print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|")
    figures = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for shape in options.shapes:
            batch, length = (int(side) for side in shape.split("x"))
            for found in (measure_t5 if options.t5 else measure_bert)(options, threads, batch, length):
                figures.append(found)
                if not options.json:
                    print(line(found), flush=True)
    if options.json:
        print(json.dumps({"model_shape": options.model_shape, "torch": torch.__version__, "cases": figures}, indent=2))


if __name__ == "__main__":
    main()
