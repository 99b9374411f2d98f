"""VGG16 on CIFAR-10 images: 20 %, 50 % and 80 % of the weights by magnitude, filters by L1 and by Taylor.

    python scripts/reference/vgg16.py fit --data data/cifar10-6k --features models/vgg16-features models/vgg16-cifar10
    python scripts/reference/vgg16.py measure --data data/cifar10-6k models/vgg16-cifar10-0 [--methods element]
    python scripts/reference/vgg16.py time models/vgg16-cifar10-0 [--methods element] [--output times.json]
    python scripts/reference/vgg16.py hf-sparse train recipes/vgg16_element_20.yaml
    python scripts/reference/vgg16.py hf-sparse train recipes/vgg16_element_20.yaml --output runs/vgg16_element_20-1
        --set seed=1 --set model.name=models/vgg16-cifar10-1
    python scripts/reference/vgg16.py hf-sparse compact runs/vgg16_filters_l1 --output runs/vgg16_filters_l1_small
    python scripts/reference/vgg16.py collect runs/vgg16_* > recipes/reference/vgg16.json

`fit` trains a classifier on the 13 convolutions, which stay as they are, and saves it with the processor of its images.
`measure` prunes copies in one shot, without training after it, and writes accuracy on the validation images and stored
bytes. `time` compares each copy with the dense model, interleaved batch by batch, and counts multiply-accumulates.
`hf-sparse` is that program with this model known to it. `collect` writes accuracy and bytes of runs. A second seed has
a classifier, an order of the images and (`measure --seed`) random scores of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.formats.inspection import inspect
from hf_sparse.profiling.machine import machine
from hf_sparse.profiling.timer import interleave
from hf_sparse.utils.atomic_io import write_text
from scripts.reference.vgg16_model import VGGConfig, VGGForImageClassification, images, processor


def fit(arguments: argparse.Namespace) -> None:
    """Train a classifier on the convolutions, and save the model and its processor."""
    layers = json.loads((arguments.features / "config.json").read_text(encoding="utf-8"))["cfg"]
    model: Any = VGGForImageClassification(VGGConfig(layers, arguments.hidden, num_labels=10))
    model.eval()
    weights = safetensors.torch.load_file(arguments.features / "model.safetensors")
    first = next(key for key in weights if weights[key].shape[1:2] == (3,))
    weights[first] = weights[first].flip(1)  # trained on blue, green, red
    own = {key.removeprefix("features."): tensor.float() for key, tensor in weights.items()}
    model.vgg.features.load_state_dict(own)
    if not arguments.epochs:
        save(model, arguments.folder)
        return
    pixels, labels = images(arguments.data, "train")
    with torch.no_grad():
        parts = [model.vgg.avgpool(model.vgg.features(part)).flatten(1) for part in pixels.split(50)]
    seen = torch.cat(parts)
    for seed in arguments.seeds:
        fit_classifier(model.vgg.classifier, seen, labels, arguments.epochs, seed)
        save(model.eval(), f"{arguments.folder}-{seed}")


def save(model: Any, folder: str | Path) -> None:
    """Write a model with its processor."""
    model.save_pretrained(folder)
    processor().save_pretrained(folder)


def fit_classifier(head: Any, seen: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    """Train a new classifier on what the convolutions give for the training images."""
    torch.manual_seed(seed)
    for layer in head:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    scale = seen.std()
    with torch.no_grad():
        head[0].weight.mul_(1 / scale)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3 / float(scale), weight_decay=0.05)
    head.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(seen)).split(100):
            nn.functional.cross_entropy(head(seen[chosen]), labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()


def accuracy(model: Any, pixels: Tensor, labels: Tensor) -> float:
    """Return the fraction of images whose class is predicted."""
    with torch.inference_mode():
        found = torch.cat([model(pixel_values=part).logits.argmax(1) for part in pixels.split(50)])
    return float((found == labels).float().mean())


def multiply_accumulates(model: nn.Module, pixels: Tensor) -> int:
    """Return those of one image, counted by hooks on the layers that are there."""
    count = 0

    def add(layer: Any, _: Any, out: Tensor) -> None:
        nonlocal count
        count += out[0].numel() * layer.weight[0].numel()

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    with torch.inference_mode():
        model(pixel_values=pixels[:1])
    for handle in handles:
        handle.remove()
    return count


def stored_bytes(model: Any) -> int:
    """Return the size of the weight file that the model is saved in."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


STRIPES = {"name": "kernel_position", "by_filter": True}
METHODS: dict[str, dict[str, Any]] = {
    "element 20 %": {"sparsity": 0.2, "targets": "*features*"},
    "element 50 %": {"sparsity": 0.5, "targets": "*features*"},
    "element 80 %": {"sparsity": 0.8, "targets": "*features*"},
    "random 20 %": {"sparsity": 0.2, "scorer": "random", "targets": "*features*"},
    "random 50 %": {"sparsity": 0.5, "scorer": "random", "targets": "*features*"},
    # Their positions cost next to nothing: as many bytes as 20 and 50 % of elements.
    "stripes 17.8 %": {"sparsity": 0.178, "pattern": STRIPES, "targets": "*features*"},
    "stripes 47 %": {"sparsity": 0.47, "pattern": STRIPES, "targets": "*features*"},
    "filters 20 %, L1": {"sparsity": 0.2, "pattern": "filter"},
    "filters 50 %, L1": {"sparsity": 0.5, "pattern": "filter"},
    "filters 80 %, L1": {"sparsity": 0.8, "pattern": "filter"},
    "filters 20 %, L1, multiples of 16": {"sparsity": 0.2, "pattern": {"name": "filter", "multiple_of": 16}},
    "filters 80 %, L1, multiples of 16": {"sparsity": 0.8, "pattern": {"name": "filter", "multiple_of": 16}},
    "filters 20 %, Taylor": {"sparsity": 0.2, "pattern": "filter", "scorer": "taylor"},
}


def variants(
    folder: Path, calibration: list[dict[str, Tensor]] | None, methods: tuple[str, ...] = ("",), seed: int = 0
) -> Iterator[tuple[str, Any, float]]:
    """Yield the dense model and pruned copies: name, model, and by how much compacting has changed the logits.

    Args:
        calibration: for Taylor scores; None = without those.
        methods: what the names of the copies begin with.
        seed: of random scores.
    """
    dense: Any = VGGForImageClassification.from_pretrained(folder)
    yield "dense", dense.eval(), 0.0
    probe = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 60
    for name, config in METHODS.items():
        if not name.startswith(methods):
            continue
        if config.get("scorer") == "random":
            config = {**config, "scorer": {"name": "random", "seed": seed}}
        taylor = config.get("scorer") == "taylor"
        if taylor and calibration is None:
            continue
        model, error = copy.deepcopy(dense), 0.0
        hf_sparse.sparsify(model, SparsityConfig(**config), calibration if taylor else None)
        if "filter" in name:
            with torch.no_grad():
                masked = model(pixel_values=probe).logits
                hf_sparse.compact(model)
                error = float((model(pixel_values=probe).logits - masked).abs().max() / masked.abs().max())
        yield name, model, error


def measure(arguments: argparse.Namespace) -> None:
    """Write accuracy and stored bytes of the model and of its pruned copies."""
    pixels, labels = images(arguments.data, "validation")
    seen, classes = images(arguments.data, "train")
    calibration = [{"pixel_values": seen[:200], "labels": classes[:200]}]
    rows = []
    for name, model, error in variants(arguments.folder, calibration, tuple(arguments.methods), arguments.seed):
        right, size = accuracy(model, pixels, labels), stored_bytes(model)
        rows.append({"method": name, "accuracy": right, "bytes": size, "masked_to_compacted": error})
        print(rows[-1], flush=True)
    setting = {"model": arguments.folder.name, "seed": arguments.seed, "images": len(pixels)}
    write(arguments, "measured.json", {**setting, "machine": machine(), "rows": rows})


def write(arguments: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    """Write what was found to the file that was named, or into the folder of the model."""
    write_text(arguments.output or arguments.folder / name, json.dumps(found, indent=1) + "\n")


def compare_times(arguments: argparse.Namespace) -> None:
    """Write times and multiply-accumulates of the pruned copies beside those of the dense model."""
    made = list(variants(arguments.folder, None, tuple(arguments.methods)))
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    for _, model, _ in made:
        model.to(memory_format=layout)
    _, dense, _ = made[0]
    rows = []
    for size in arguments.sizes:
        pixels = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0)) * 60
        pixels = pixels.to(memory_format=layout)
        whole = multiply_accumulates(dense, pixels)
        for name, model, error in made[1:]:
            runs = {"dense": partial(dense, pixel_values=pixels), "pruned": partial(model, pixel_values=pixels)}
            seconds = interleave(runs, arguments.repeats)
            before, after = (1000 * statistics.median(each) for each in seconds.values())
            fewer = whole / multiply_accumulates(model, pixels)
            row = {"size": size, "method": name, "dense_ms": before, "ms": after, "faster": before / after}
            rows.append({**row, "fewer_macs": fewer, "masked_to_compacted": error})
            print(json.dumps(rows[-1]), flush=True)
    setting = {"batch": 8, "repeats": arguments.repeats, "channels_last": arguments.channels_last}
    write(arguments, "times.json", {"machine": machine(), **setting, "rows": rows})


def collect(folders: list[Path]) -> list[dict[str, Any]]:
    """Return what runs have reached: accuracy, zeros of the targeted weights, parameters and bytes of the file."""
    rows = []
    for folder in folders:
        measured = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
        held = inspect(folder)
        nonzeros, targeted = (sum(getattr(each, key) for each in held.weights) for key in ("nonzeros", "parameters"))
        rows.append({
            "run": folder.name,
            "accuracy": measured["eval_accuracy"],
            "zeros": 1 - nonzeros / targeted if held.packed else 0.0,
            "parameters": sum(tensor.parameters for tensor in held.tensors),
            "bytes": sum(held.files.values()),
        })  # fmt: skip
    return rows


def main() -> None:
    """Run one command."""
    if sys.argv[1:2] == ["hf-sparse"]:
        from hf_sparse.cli.main import main as hf_sparse_main

        raise SystemExit(hf_sparse_main(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("fit", "measure", "time", "collect"))
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[""], help="those whose name begins with one of these")
    parser.add_argument("--seed", type=int, default=0, help="of random scores")
    parser.add_argument("--output", type=Path, help="file of the results, instead of one in the folder of the model")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=512, help="width of the classifier")
    arguments = parser.parse_args()
    if arguments.command == "collect":
        print(json.dumps(collect(arguments.folder), indent=1))
        return
    (arguments.folder,) = arguments.folder
    {"fit": fit, "measure": measure, "time": compare_times}[arguments.command](arguments)


if __name__ == "__main__":
    main()
