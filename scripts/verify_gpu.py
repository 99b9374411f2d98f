"""Check and time every GPU path of hf_sparse on this machine: one JSON, one Markdown table.

    python scripts/verify_gpu.py                   # writes verify_gpu.json and verify_gpu.md; some minutes
    python scripts/verify_gpu.py --quick --out DIR

Matmuls are compared with fp64, per shape and dtype; times are of CUDA events, sparse and dense interleaved, median and
quartiles. Then layers go into runtime form and back (`to_runtime`), a packed model is loaded with device_map="auto" on
all GPUs there are, loading it for tensor parallelism has to be refused in words, and a short training with the callback
runs under torchrun. Without CUDA it says so, and exits with 3; with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from hf_sparse.profiling.timer import in_rounds, quartiles

SHAPES = [(768, 768), (3072, 768), (768, 3072), (4096, 4096), (11008, 4096), (4096, 11008)]
TOKENS = [1, 128, 2048, 8192]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BOUNDS = {"fp16": 2e-3, "bf16": 1.6e-2, "fp32": 1e-5}
"""What the rounding of the result may cost, as a share of the largest exact value."""

Row = dict[str, Any]
STATES = {True: "ok", False: "WRONG", None: "not run"}


def times(functions: dict[str, Callable[[], Any]], rounds: int, inner: int = 5) -> dict[str, list[float]]:
    """Return quartiles in microseconds of each function, interleaved."""

    def microseconds(function: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / inner

    runs = {name: partial(microseconds, function) for name, function in functions.items()}
    found = in_rounds(runs, rounds, warmup=3)  # Triton compiles, cuSPARSELt plans
    return {name: list(quartiles(each)) for name, each in found.items()}


def weight_of(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return random weights on the GPU: "2:4", or blocks like "32x32" of which a fifth is kept."""
    weight = torch.randn(shape, device="cuda") * shape[1] ** -0.5
    if kind == "2:4":
        order = torch.rand(weight.numel() // 4, 4, device="cuda").argsort(1)
        return torch.where((order < 2).view(shape), weight, 0.0).to(dtype)
    side = int(kind.split("x")[0])
    flags = torch.rand(shape[0] // side, shape[1] // side, device="cuda") < 0.2
    mask = flags.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return torch.where(mask, weight, 0.0).to(dtype)


def path_of(path: str, layer: nn.Linear) -> tuple[str | None, Callable[[], nn.Module]]:
    """Return why a path cannot take a layer, or None, and what makes its layer."""
    from hf_sparse.kernels.gpu import block_sparse, semi_structured

    weight, capability = layer.weight.detach(), torch.cuda.get_device_capability()
    shape = tuple(weight.shape)
    if "x" in path:
        side = int(path.split("x")[0])
        why = block_sparse.refusal(shape, weight.dtype, capability, side, side)
        return why, lambda: block_sparse.BlockSparseLinear.from_linear(layer, side, side)
    backend = path.removeprefix("2:4 ")
    why = semi_structured.refusal(shape, weight.dtype, capability, backend, weight)
    return why, lambda: semi_structured.SemiStructuredLinear.from_linear(layer, backend)


def product(path: str, shape: tuple[int, int], name: str, tokens: list[int], rounds: int) -> list[Row]:
    """Check and time one path on one layer."""
    dtype = DTYPES[name]
    layer = nn.Linear(shape[1], shape[0], device="cuda", dtype=dtype)
    layer.weight.data.copy_(weight_of(path.split()[0], shape, dtype))
    row: Row = {"path": path, "shape": list(shape), "dtype": name}
    why, make = path_of(path, layer)
    if why:
        return [{**row, "refused": why}]
    made = make()
    if not torch.equal(made.to_linear().weight, layer.weight):  # type: ignore[operator]
        return [{**row, "ok": False, "error": "the dense weight does not come back"}]
    rows = []
    for count in tokens:
        x = torch.randn(count, shape[1], device="cuda", dtype=dtype)
        exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        error = float((made(x).double() - exact).abs().max() / exact.abs().max())
        del exact
        found = times({"sparse": lambda x=x: made(x), "dense": lambda x=x: layer(x)}, rounds)  # type: ignore[misc]
        gain = found["dense"][1] / found["sparse"][1]
        rows.append({**row, "tokens": count, "ok": error <= BOUNDS[name], "off": error, "gain": gain, "us": found})
    return rows


def products(quick: bool) -> list[Row]:
    """Check and time all paths; what breaks is a row too."""
    shapes, tokens, rounds = (SHAPES[:2], TOKENS[:2], 5) if quick else (SHAPES, TOKENS, 30)
    rows: list[Row] = []
    for path in ("2:4 cusparselt", "2:4 cutlass", "32x32", "64x64"):
        for shape in shapes:
            for name in DTYPES:
                try:
                    with torch.no_grad():
                        rows += product(path, shape, name, tokens, rounds)
                except Exception as error:  # noqa: BLE001  one broken path must not hide the others
                    rows.append({"path": path, "shape": list(shape), "dtype": name, "ok": False, "error": repr(error)})
    return rows


def runtime(device: str = "cuda", dtype: torch.dtype = torch.float16, width: int = 1024) -> list[Row]:
    """Bring layers into runtime form, which times and chooses by itself, compare them, and bring them back."""
    from hf_sparse import SparsityConfig, sparsify, to_dense_runtime, to_runtime
    from hf_sparse.runtime import SpeedTable

    rows: list[Row] = []
    blocks: Any = {"name": "block", "rows": 64, "cols": 64}
    asked: list[tuple[str, Any, float]] = [("2:4", "2:4", 0.5), ("blocks", blocks, 0.75)]
    for name, pattern, sparsity in asked:
        model = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        sparsify(model, SparsityConfig(targets="*", sparsity=sparsity, pattern=pattern)).to(device, dtype).eval()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        x = torch.randn(2, 96, width, device=device, dtype=dtype)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            exact = model(x).double()
            report = to_runtime(model, table=SpeedTable(Path(folder) / "times.json"))
            off = float((model(x).double() - exact).abs().max() / exact.abs().max())
            if report.sparse:
                to_dense_runtime(model)
        after = model.state_dict()
        same = list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
        layers = [{"kernel": one.kernel, "gains": dict(one.gains), "reason": one.reason} for one in report.layers]
        ok = same and off <= 2 * BOUNDS["fp16"]  # two products, each rounded as the dense one is
        rows.append({"check": f"to_runtime, {name}", "ok": ok, "off": off, "same": same, "layers": layers})
    return rows


# -- models ----------------------------------------------------------------------------------------------------------


def sparse_model(folder: str) -> Any:
    """Save a packed BERT with random weights, and return it."""
    from transformers import BertConfig, BertForSequenceClassification

    from hf_sparse import SparsityConfig, sparsify

    torch.manual_seed(0)
    model: Any = BertForSequenceClassification(BertConfig(vocab_size=1000, num_hidden_layers=4))
    model.cuda()
    sparsify(model, SparsityConfig(sparsity=0.9, scorer="magnitude"))
    model.save_pretrained(folder)
    return model


def loading() -> list[Row]:
    """Load a packed model over all GPUs, and over GPUs too small for it."""
    from transformers import BertForSequenceClassification

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = sparse_model(folder).eval()
        ids = torch.randint(1000, (2, 32), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        # The limit spreads so small a model over several GPUs.
        limit: Any = dict.fromkeys(range(torch.cuda.device_count()), "60MB") | {"cpu": "4GB"}
        for name, options in {"auto": {}, "auto, small GPUs": {"max_memory": limit}}.items():
            loaded = BertForSequenceClassification.from_pretrained(folder, device_map="auto", **options).eval()
            with torch.no_grad():
                off = float((loaded(ids).logits.float().to("cuda") - model(ids).logits).abs().max())
            same = all(
                torch.equal(a.cpu(), b.cpu())
                for a, b in zip(model.parameters(), loaded.parameters(), strict=True)
                if not b.is_meta
            )
            where = sorted({str(device) for device in loaded.hf_device_map.values()})
            rows.append({"check": f"device_map {name}", "ok": same and off < 1e-4, "off": off, "devices": where})
        rows[-1]["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return rows


def train() -> None:
    """Train some steps with the callback; one process of several, started by torchrun."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    from hf_sparse import SparsityCallback, SparsityConfig, summarize

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=100, intermediate_size=256, **sizes))
    data: Any = [{"input_ids": torch.randint(100, (16,)), "labels": index % 2} for index in range(256)]
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=20, per_device_train_batch_size=8, report_to=[], save_strategy="no", bf16=half
        )
        callback = SparsityCallback(SparsityConfig(sparsity=0.8, scorer=os.environ["VERIFY_SCORER"]))
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback]).train()
    print(json.dumps({"summary": str(summarize(model)), "device": str(model.device)}))


def tensor_parallel() -> None:
    """Load a packed model into shards, which has to be refused in words; one process of several."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from hf_sparse import BackendError, SparsityConfig, sparsify

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=8, num_key_value_heads=8, **sizes))
        sparsify(model, SparsityConfig(sparsity=0.9)).save_pretrained(folder)
        try:
            AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
        except BackendError as error:
            print(json.dumps({"refused": str(error)}))
            return
    raise SystemExit("a packed checkpoint was loaded into shards")


WORKERS = {"train": train, "tensor_parallel": tensor_parallel}


def under_torchrun(worker: str, check: str, **env: str) -> Row:
    """Run a worker on all GPUs."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        + [f"--nproc-per-node={torch.cuda.device_count()}", __file__, "--worker", worker],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    row: Row = {"check": f"{check}, {torch.cuda.device_count()} GPUs", "ok": done.returncode == 0}
    return {**row, "said": (done.stdout if row["ok"] else done.stderr)[-1500:]}


def distributed() -> list[Row]:
    """Train with DDP, where the callback itself compares the masks of the processes, and load into shards."""
    rows = [under_torchrun("train", f"DDP, {scorer}", VERIFY_SCORER=scorer) for scorer in ("magnitude", "movement")]
    if torch.cuda.device_count() > 1:
        rows.append(under_torchrun("tensor_parallel", "tp_plan is refused"))
    else:
        rows.append({"check": "tp_plan is refused", "ok": None, "said": "not run: it takes two GPUs"})
    return rows


# -- report ----------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what all figures depend on."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        cards = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    import transformers

    from hf_sparse.kernels.gpu import block_sparse, semi_structured

    return {
        "cards, driver": cards,
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cusparselt": semi_structured.cusparselt_version(),
        "triton": block_sparse.has_triton() and __import__("triton").__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = [f"- {key}: {value}" for key, value in result["machine"].items()]
    lines += ["", "| path | out x in | type | tokens | sparse us | dense us | gain | off | |", "|" + "---|" * 9]
    for row in result["products"]:
        start = f"| {row['path']} | {row['shape'][0]} x {row['shape'][1]} | {row['dtype']} |"
        if "us" not in row:
            why = row.get("refused") or "WRONG: " + row["error"]
            lines.append(f"{start} | | | | | {why.replace('|', '/')} |")
            continue
        spans = [f"{q[1]:.1f} ({q[0]:.1f}-{q[2]:.1f})" for q in (row["us"]["sparse"], row["us"]["dense"])]
        end = "" if row["ok"] else "WRONG"
        lines.append(f"{start} {row['tokens']} | {' | '.join(spans)} | {row['gain']:.2f} | {row['off']:.1e} | {end} |")
    lines += ["", "| check | | |", "|---|---|---|"]
    for row in result["checks"]:
        rest = {key: value for key, value in row.items() if key not in ("check", "ok")}
        lines.append(f"| {row['check']} | {STATES[row['ok']]} | {json.dumps(rest).replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--quick", action="store_true", help="two shapes, few rounds")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"verify_gpu needs a CUDA device, and torch {torch.__version__} sees none", file=sys.stderr)
        return 3
    if options.worker:
        WORKERS[options.worker]()
        return 0
    result: dict[str, Any] = {"machine": machine(), "products": products(options.quick), "checks": []}
    result["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    for check in (runtime, loading, distributed):
        try:
            result["checks"] += check()
        except Exception as error:  # noqa: BLE001  the products are worth writing even so
            result["checks"].append({"check": check.__name__, "ok": False, "said": repr(error)})
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "verify_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "verify_gpu.md").write_text(table(result))
    print(table(result))
    wrong = [row for row in (*result["products"], *result["checks"]) if row.get("ok") is False]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
