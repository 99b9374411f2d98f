"""Sentences per second and quality of a sentence-embedding model: torch, ours, and sentence-transformers' back ends.

    python scripts/benchmarks/bench_embedding.py DENSE --data DATA --sparse "4x1 80 %=runs/4x1" --threads 1 2 \
        --onnx ort/bin/python --openvino ov/bin/python --json embedding.json --plot embedding.png

--onnx and --openvino are the Pythons of environments with `sentence-transformers[onnx]` and `[openvino]`, which cannot
be installed together; without them, torch and ours alone. In a folder --work, embeddings and exported models are kept:
`--prepare` makes them, so that a later run on an idle machine takes times alone. `--plot` also draws the rows of files
that were written before: --from one.json two.json.
Every engine runs in a process of its own and encodes the same sentences through `SentenceTransformer.encode`: a sample
of STS-B with its lengths, and of bbc-news, cut at the model's 256 tokens. Engines take turns, in the reverse order each
round, so that other load on the machine affects all; medians and quartiles. Quality is the Spearman correlation on all
of STS-B validation, of the embeddings that each engine gives. Pin the process to as many cores as threads (taskset), or
engines may spread out. --avx2 keeps torch, ours and OpenVINO to AVX2 code on a processor with more, as far as their own
switches do; ONNX Runtime has none, and takes its avx2 configuration for int8. That is not a processor with AVX2 alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from avx2_code import keep_to_avx2  # type: ignore[import-not-found]  # beside this file
from tqdm.auto import tqdm

from hf_sparse.profiling.machine import machine
from hf_sparse.profiling.timer import in_rounds, quartiles
from hf_sparse.recipe.metrics import spearman
from hf_sparse.recipe.ranking import cosine
from hf_sparse.reporting.plotting import new_figure, write_figure, write_labels

ENGINE = Path(__file__).with_name("embedding_engine.py")
ROOT = Path(__file__).parents[2]
PEERS = ("onnx", "onnx-int8", "openvino", "openvino-int8")


def sentences_of(data: Path, count: int, long: int) -> tuple[dict[str, Any], list[float]]:
    """Return what the engines embed, and the scores of the pairs of STS-B validation."""
    rows = [json.loads(line) for line in (data / "stsb/validation.jsonl").open(encoding="utf-8")]
    news = [json.loads(line)["text"] for line in (data / "bbc-news/validation.jsonl").open(encoding="utf-8")]
    train = [json.loads(line)["sentence1"] for line in (data / "stsb/train.jsonl").open(encoding="utf-8")]
    both = [row["sentence1"] for row in rows] + [row["sentence2"] for row in rows]
    drawn = random.Random(0)  # noqa: S311  a sample, no secret
    timed = {"stsb": drawn.sample(both, min(count, len(both))), "bbc-news": drawn.sample(news, min(long, len(news)))}
    return {"all": both, "timed": timed, "calibration": drawn.sample(train, 300)}, [row["label"] for row in rows]


class Engine:
    """A process that encodes on request."""

    def __init__(self, python: str, kind: str, model: str, folder: Path, threads: int, batch: int) -> None:
        capped = " avx2" if os.environ.get("HF_SPARSE_ISA") == "avx2" else ""
        digest = hashlib.sha256(f"{kind} {Path(model).resolve()}{capped}".encode()).hexdigest()[:16]
        self.output = folder / f"{digest}.npy"
        environment = {**os.environ, "PYTHONPATH": str(ROOT) if python == sys.executable else ""}
        environment |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [python, str(ENGINE), kind, model, str(folder / "sentences.json"), str(self.output)]
        command.append(str(folder / f"exported-{digest}"))
        self.log = (folder / f"{self.output.stem}.log").open("w+")
        self.process = subprocess.Popen(
            [*command, str(threads), str(batch)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True, env=environment,
        )  # fmt: skip

    def version(self) -> str:
        """Wait until it is ready, and return its versions."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ready "):
                return line.removeprefix("ready ").strip()
        self.log.seek(0)
        raise RuntimeError("\n".join(self.log.read().splitlines()[-4:]))

    def seconds(self, name: str) -> float:
        """Return the seconds of one `encode` of the sentences of that name."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


@dataclasses.dataclass(frozen=True)
class Started:
    """An engine that is ready."""

    name: str
    engine: Engine
    version: str


def engines_of(options: argparse.Namespace) -> dict[str, tuple[str, str, str]]:
    """Return Python, kind and model of each engine, by the name it is reported under."""
    found = {"torch fp32, dense": (sys.executable, "torch", options.dense)}
    for given in options.sparse:
        name, _, path = given.rpartition("=")
        found[f"ours fp32, {name}"] = (sys.executable, "ours", path)
        if options.int8:
            found[f"ours int8, {name}"] = (sys.executable, "ours-int8", path)
    for kind in options.peers:
        engine, _, dtype = kind.partition("-")
        if python := getattr(options, engine):
            found[f"{engine} {dtype or 'fp32'}, dense"] = (python, kind, options.dense)
    return found


def start(options: argparse.Namespace, folder: Path, threads: int, close: bool = False) -> Iterator[Started]:
    """Yield the engines that could start, one after the other; name those that could not.

    Args:
        close: end each before the next one starts.
    """
    for name, (python, kind, model) in engines_of(options).items():
        engine = Engine(python, kind, model, folder, threads, options.batch)
        try:
            yield Started(name, engine, engine.version())
        except RuntimeError as error:
            engine.close()
            print(f"left out: {name}: {error}", file=sys.stderr)
        if close:
            engine.close()


def measure(options: argparse.Namespace, threads: int, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of one number of threads; none where the engines are only to be prepared."""
    given, truth = sentences_of(options.data, options.count, options.long)
    (folder / "sentences.json").write_text(json.dumps(given), encoding="utf-8")
    if options.prepare:
        for each in start(options, folder, threads, close=True):
            print(f"ready: {each.name}: {each.version}", file=sys.stderr)
        return []
    ready: list[Started] = []
    try:
        ready += start(options, folder, threads)
        print(f"{len(ready)} engines are ready", file=sys.stderr, flush=True)
        while options.wait and not options.wait.exists():
            time.sleep(0.05)
        pairs = [(each, data) for each in ready for data in given["timed"]]
        with tqdm(total=options.rounds * len(pairs), desc=f"{threads} threads") as bar:

            def seconds_of(each: Started, data: str) -> float:
                bar.update()
                return each.engine.seconds(data)

            runs = {(each.name, data): partial(seconds_of, each, data) for each, data in pairs}
            seconds = in_rounds(runs, options.rounds, warmup=0)  # each engine has computed everything once
    finally:
        for each in ready:
            each.engine.close()
    rows = []
    for each in ready:
        found = np.load(each.engine.output, allow_pickle=False)
        quality = spearman(cosine(found[: len(truth)], found[len(truth) :]), np.asarray(truth))
        rates = {
            data: [len(given["timed"][data]) / value for value in reversed(quartiles(times))]
            for (name, data), times in seconds.items()
            if name == each.name
        }
        rows.append({
            "engine": each.name, "version": each.version, "threads": threads, "avx2": options.avx2, "stsb": quality,
            "rate": rates,
        })  # fmt: skip
    return rows


def torch_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of torch that took turns with another."""
    alike = ("threads", "avx2", "run")
    return next(
        other
        for other in rows
        if other["engine"].startswith("torch") and all(other.get(key) == row.get(key) for key in alike)
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, with the speed as a multiple of torch."""
    lines = [
        "| engine | threads | STS-B Spearman | STS-B sentences/s | x torch | bbc-news examples/s | x torch |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base, cells = torch_of(row, rows), []
        for data in ("stsb", "bbc-news"):
            low, middle, high = row["rate"][data]
            cells += [f"{middle:.1f} [{low:.1f}, {high:.1f}]", f"{middle / base['rate'][data][1]:.2f}"]
        threads = f"{row['threads']}{', AVX2' if row.get('avx2') else ''}"
        lines.append(f"| {row['engine']} | {threads} | {row['stsb']:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw quality against sentences per second of STS-B over those of torch in the same run."""
    threads = min(row["threads"] for row in rows)
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    marks = {"torch": "o", "ours": "*", "onnx": "s", "openvino": "D"}
    shown = {row["engine"]: row for row in reversed(rows) if row["threads"] == threads and not row.get("avx2")}
    points, names, colors = [], [], []
    for row in shown.values():
        kind = row["engine"].split()[0]
        points.append((row["rate"]["stsb"][1] / torch_of(row, rows)["rate"]["stsb"][1], row["stsb"]))
        names.append(row["engine"].removeprefix("ours ").removesuffix(", dense").replace("element", "unstructured"))
        colors.append("tab:red" if kind == "ours" else "tab:gray")
        axes.scatter(*points[-1], marker=marks[kind], s=120 if kind == "ours" else 50, color=colors[-1])
    axes.set_title("hf_sparse (red) and the dense model in other engines (grey)", fontsize=10)
    axes.margins(0.15)  # room for the names
    axes.set_xlabel(f"STS-B sentences per second over torch, {threads} thread{'s' if threads > 1 else ''}")
    axes.set_ylabel("Spearman on STS-B validation")
    write_labels(figure, axes, points, names, colors, size=9)
    write_figure(figure, path)


def main() -> None:
    """Measure, print, and write what is requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", nargs="?", help="folder of the dense SentenceTransformer")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--sparse", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--int8", action="store_true", help="also ours with int8")
    parser.add_argument("--onnx", metavar="PYTHON")
    parser.add_argument("--openvino", metavar="PYTHON")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="which of their engines (all)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--count", type=int, default=512, help="sentences of STS-B that are timed (512)")
    parser.add_argument("--long", type=int, default=32, help="examples of bbc-news that are timed (32)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--avx2", action="store_true", help="keep to AVX2 what has a switch for it")
    parser.add_argument("--work", type=Path, help="folder for embeddings and exported models (one that is removed)")
    parser.add_argument("--wait", type=Path, help="when all are ready, time as soon as this file is there")
    parser.add_argument("--prepare", action="store_true", help="make what is kept in --work, and take no times")
    parser.add_argument("--from", dest="files", type=Path, nargs="+", help="print and plot these; measure nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.avx2:
        keep_to_avx2()
    if options.files:
        rows = [
            {"run": file.stem, **row}
            for file in options.files
            for row in json.loads(file.read_text(encoding="utf-8"))["rows"]
        ]
    elif options.dense is None or options.data is None:
        parser.error("give DENSE and --data, or --from")
    else:
        with contextlib.ExitStack() as stack:
            folder = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            rows = [row for threads in options.threads for row in measure(options, threads, folder)]
    if not rows:
        return
    print(table(rows))
    if options.json:
        text = json.dumps({"machine": machine(), "batch": options.batch, "rows": rows}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
