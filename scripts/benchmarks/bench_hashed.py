"""HashedLinear on MNIST beside networks of the same size, and the time and memory of the layer.

    python scripts/benchmarks/bench_hashed.py accuracy mnist5k.npz [--ratio 0.125] [--seeds 0 1 2] [--output FILE]
    python scripts/benchmarks/bench_hashed.py speed [--rows 1 50 128 512 2048] [--output FILE]

`accuracy` trains 784-1000-10 networks from scratch: dense, with hashed layers (`ratio` of the parameters), and networks
with at most as many parameters: dense with fewer hidden units, low rank, and a random fixed mask (Chen et al. 2015,
table 1). The learning rate of each is chosen on a part of the training examples. `speed` times forward and backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_sparse.modeling.forms import HashedLinear, LowRankLinear
from hf_sparse.profiling.machine import machine
from hf_sparse.profiling.timer import interleave
from hf_sparse.utils.atomic_io import write_text

INPUTS, HIDDEN, OUTPUTS = 784, 1000, 10
EPOCHS, BATCH = 15, 100
RATES = (3e-4, 1e-3, 3e-3)
ROUNDS = 15


class FixedMask(nn.Module):
    """A mask that never changes."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = nn.Buffer(mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with zeros."""
        return weight * self.mask


def random_mask(inputs: int, outputs: int, ratio: float) -> nn.Linear:
    """Return a layer of which a random part of the weights is there; larger at the start, as fewer are added up."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.mul_(min(1 / ratio, inputs) ** 0.5)
    mask = torch.rand(outputs, inputs).flatten().argsort().argsort().view(outputs, inputs) < ratio * inputs * outputs
    parametrize.register_parametrization(layer, "weight", FixedMask(mask))
    return layer


def low_rank(inputs: int, outputs: int, ratio: float) -> nn.Module:
    """Return a layer of two thin matrices; the last layer stays dense (rank 1 could not tell ten classes apart)."""
    if outputs == OUTPUTS:
        return nn.Linear(inputs, outputs)
    budget = ratio * (INPUTS * HIDDEN + HIDDEN * OUTPUTS) - HIDDEN * OUTPUTS
    rank = int(budget / (inputs + outputs))
    layer = LowRankLinear(inputs, outputs, rank)
    with torch.no_grad():  # products with the variance that nn.Linear starts with
        layer.down.normal_(0, inputs**-0.5)
        layer.up.normal_(0, (3 * rank) ** -0.5)
    return layer


def networks(ratio: float) -> dict[str, Callable[[], nn.Sequential]]:
    """Return what makes each network."""

    def network(layer: Callable[[int, int], nn.Module], hidden: int = HIDDEN) -> nn.Sequential:
        return nn.Sequential(layer(INPUTS, hidden), nn.ReLU(), nn.Dropout(0.2), layer(hidden, OUTPUTS))

    total = sum(int(ratio * a * b) + b for a, b in ((INPUTS, HIDDEN), (HIDDEN, OUTPUTS)))
    small = (total - OUTPUTS) // (INPUTS + 1 + OUTPUTS)
    return {
        "dense": lambda: network(nn.Linear),
        "hashed": lambda: network(lambda a, b: HashedLinear(a, b, int(ratio * a * b), seed=a)),
        "small dense": lambda: network(nn.Linear, small),
        "low rank": lambda: network(lambda a, b: low_rank(a, b, ratio)),
        "random mask": lambda: network(lambda a, b: random_mask(a, b, ratio)),
    }


def parameters(model: nn.Module, ratio: float) -> int:
    """Return how many numbers have to be stored; of a random mask, whose seed is enough, those that are kept."""
    masks = {m for m in model.modules() if isinstance(m, FixedMask)}
    removed = sum(m.mask.numel() - int(torch.count_nonzero(m.mask)) for m in masks)
    return sum(p.numel() for p in model.parameters()) - removed


def train(make: Callable[[], nn.Module], data: tuple[Tensor, Tensor], rate: float, seed: int) -> nn.Module:
    """Return a network after some epochs of Adam with a rate that falls to zero."""
    torch.manual_seed(seed)
    model, (x, y) = make(), data
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def error(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the percentage of wrong classes."""
    x, y = data
    return 100 * float((model(x).argmax(1) != y).double().mean())


def load(path: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return training and test examples (`validation_*` of the file), from -1 to 1."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    found = []
    for names in (("train_x", "train_y"), ("validation_x", "validation_y")):
        x, y = (torch.from_numpy(arrays[name]) for name in names)
        x = x.reshape(len(x), -1).float()
        found.append((x / float(x.max()) * 2 - 1, y.long().flatten()))
    return found[0], found[1]


def accuracy(options: argparse.Namespace) -> None:
    """Train all networks and print the table."""
    training, test = load(options.path)
    cut = len(training[0]) * 4 // 5
    part, held = tuple(t[:cut] for t in training), tuple(t[cut:] for t in training)
    rows: list[dict[str, Any]] = []
    for name, make in networks(options.ratio).items():
        if options.networks and name not in options.networks:
            continue
        tried = {rate: error(train(make, part, rate, 0), held) for rate in RATES}  # type: ignore[arg-type]
        rate = min(tried, key=lambda each: tried[each])
        errors = [error(train(make, training, rate, seed), test) for seed in options.seeds]
        size = parameters(make(), options.ratio)
        rows.append({"network": name, "parameters": size, "rate": rate, "errors": errors})
        print(rows[-1], flush=True)
    if options.output:
        write_text(options.output, json.dumps(rows, indent=1) + "\n")
    print("| network | parameters | test error (mean) | per seed |\n|---|---|---|---|")
    for row in rows:
        each = " ".join(f"{value:.2f}" for value in row["errors"])
        print(f"| {row['network']} | {row['parameters']:,} | {statistics.mean(row['errors']):.2f} % | {each} |")


def passes(layer: nn.Module, x: Tensor, above: Tensor) -> None:
    """Run forward and backward."""
    layer(x).backward(above)


def speed(options: argparse.Namespace) -> None:
    """Time forward and backward of one layer, all three gradients."""
    torch.set_num_threads(1)
    print(f"{machine()}, fp32, 1/8 of the values")
    print("| layer | rows | dense ms | hashed ms | ratio |\n|---|---|---|---|---|")
    found: list[dict[str, Any]] = []
    for inputs, outputs in ((784, 1000), (768, 768), (768, 3072), (3072, 768)):
        for rows in options.rows:
            x, above = torch.randn(rows, inputs, requires_grad=True), torch.randn(rows, outputs)
            dense, hashed = nn.Linear(inputs, outputs), HashedLinear(inputs, outputs, inputs * outputs // 8)
            runs = {"dense": partial(passes, dense, x, above), "hashed": partial(passes, hashed, x, above)}
            seconds = interleave(runs, ROUNDS, warmup=1, inference=False)
            times = [1e3 * statistics.median(each) for each in seconds.values()]
            ratio = times[1] / times[0]
            print(f"| {inputs} x {outputs} | {rows} | {times[0]:.2f} | {times[1]:.2f} | {ratio:.2f} |", flush=True)
            layer = {"inputs": inputs, "outputs": outputs, "rows": rows}
            found.append({**layer, "dense_ms": times[0], "hashed_ms": times[1], "ratio": ratio})
    if options.output:
        setting = {"machine": machine(), "dtype": "float32", "ratio": 1 / 8, "rounds": ROUNDS}
        write_text(options.output, json.dumps({**setting, "rows": found}, indent=1) + "\n")


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("accuracy")
    one.add_argument("path", type=Path)
    one.add_argument("--ratio", type=float, default=0.125)
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one.add_argument("--networks", nargs="+", help="names of rows; without it, all of them")
    one.add_argument("--output", type=Path)
    one.set_defaults(run=accuracy)
    two = verbs.add_parser("speed")
    two.add_argument("--rows", type=int, nargs="+", default=[1, 50, 128, 512, 2048])
    two.add_argument("--output", type=Path)
    two.set_defaults(run=speed)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
