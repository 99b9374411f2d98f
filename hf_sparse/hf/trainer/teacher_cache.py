"""What a teacher says to every training example, on disk: run it once, then train as often as you like without it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ...distillation.distiller import Distiller
from ...distillation.example_keys import Examples
from ...errors import CheckpointError, RecipeError, SparsityError

VERSION = 1
STORED = {"fp32": "float32", "fp16": "float16"}
LOGITS = ("logits", "start_logits", "end_logits")
_ROWS, _FACTS = "logits.arrow", "teacher_cache.json"
_BATCH = 32


class TeacherCache:
    """Logits of a teacher by example; takes the place of the teacher in a `Distiller`.

    Args:
        folder: as `write_cache` has made it.

    Raises:
        CheckpointError: if there is no complete cache in the folder, or one that this version cannot read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.facts: dict[str, Any] = json.loads((self.folder / _FACTS).read_text(encoding="utf-8"))
            if not isinstance(self.facts, dict):
                raise ValueError(f"{_FACTS} holds no mapping")
            rows = datasets.Dataset.from_file(str(self.folder / _ROWS))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder} has no complete cache of a teacher ({error}). Make one: hf-sparse teach RECIPE "
                f"--output {self.folder}"
            ) from error
        if self.facts.get("version") != VERSION:
            raise CheckpointError(
                f"{self.folder} is a cache of version {self.facts.get('version')!r}, but this hf_sparse reads version "
                f"{VERSION}. Make it anew: hf-sparse teach RECIPE --output {self.folder}"
            )
        self._row = {key: row for row, key in enumerate(rows["key"])}
        self._rows = rows.with_format("numpy")

    @classmethod
    def open(cls, folder: str | Path, teacher: nn.Module) -> Self:
        """Open the cache and check that it is of this teacher.

        Raises:
            CheckpointError: if it is not, or as the class.
        """
        cache = cls(folder)
        cache._compare("teacher", weights_fingerprint(teacher), "its weights are not those that the recipe names now")
        return cache

    def check(self, tokenizer: Any, keys: Iterable[str] | None) -> None:
        """Raise `CheckpointError` if the cache was made with another tokenizer, or of other training data.

        Args:
            tokenizer: None = unknown; the examples, made of its tokens, are compared all the same.
            keys: of all training examples; None = unknown (a stream), then each is looked for when it comes.
        """
        if tokenizer is not None and self.facts["tokenizer"] is not None:
            self._compare("tokenizer", tokenizer_fingerprint(tokenizer), "it cuts texts into other tokens")
        if keys is not None:
            self._compare("data", data_fingerprint(keys), "the training examples (or max_length) have changed")

    def _compare(self, what: str, found: str, why: str) -> None:
        if self.facts[what] != found:
            raise CheckpointError(
                f"the cache in {self.folder} was made with another {what}: {why} (fingerprint {found}, in the cache "
                f"{self.facts[what]}). Make it anew: hf-sparse teach RECIPE --output {self.folder}"
            )

    def look_up(self, examples: Examples) -> dict[str, Tensor]:
        """Return what the teacher said to a batch, padded with zeros where the batch is.

        Raises:
            SparsityError: if an example is not in the cache.
        """
        keys = examples.names()
        for place, key in enumerate(keys):
            if key not in self._row:
                raise SparsityError(
                    f"the cache in {self.folder} has no logits for example {place} of this batch (key {key}), so the "
                    "teacher cannot be asked. Examples that change while training (random masking, augmentation) "
                    "cannot be cached: leave distillation.cache out, or make the cache anew of this data"
                )
        found = [self._rows[self._row[key]] for key in keys]
        device = next(value.device for value in examples.inputs.values() if isinstance(value, Tensor))
        return {
            name: self._batched(name, [_unflat(row, name) for row in found], examples).to(device)
            for name in self.facts["logits"]
        }

    def _batched(self, name: str, rows: Sequence[Tensor], examples: Examples) -> Tensor:
        if name == "logits" and rows[0].ndim < 2:
            return torch.stack(list(rows))
        mask = examples.targets if examples.writes else examples.inputs.get("attention_mask")
        if mask is None:  # nothing is padded
            return torch.stack(list(rows))
        mask = mask.bool().cpu()
        out = torch.zeros((*mask.shape, *rows[0].shape[1:]))
        for place, row in enumerate(rows):
            out[place, mask[place]] = row
        return out


def _unflat(row: Mapping[str, Any], name: str) -> Tensor:
    shape = [int(size) for size in row[f"{name}_shape"]]
    return torch.from_numpy(np.array(row[name], dtype=np.float32)).view(shape)


@torch.no_grad()
def write_cache(
    distiller: Distiller, batches: Iterable[Mapping[str, Any]], folder: str | Path, tokenizer: Any, dtype: str = "fp32"
) -> int:
    """Ask the teacher about every batch once, write its logits without padding, and return how many examples there are.

    The file that makes the cache complete is written last.

    Args:
        distiller: with the teacher, as for training.
        batches: of all training examples, in any order.
        tokenizer: None if there is none; for the check in `TeacherCache`.
        dtype: of the numbers on disk, "fp32" or "fp16" (half the size, not exact).

    Raises:
        RecipeError: for a dtype that is none.
        SparsityError: if the teacher returns no logits, or some that are not finite in this dtype.
    """
    if dtype not in STORED:
        raise RecipeError(f"a cache is stored as {' or '.join(STORED)}, not {dtype!r}")
    assert isinstance(distiller.teacher, nn.Module)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Removed and not written over: a training that reads the old rows has mapped their file, and keeps it so.
    for name in (_FACTS, _ROWS):
        (folder / name).unlink(missing_ok=True)
    device = next((parameter.device for parameter in distiller.teacher.parameters()), torch.device("cpu"))
    seen: set[str] = set()
    names: list[str] = []
    writer: ArrowWriter | None = None
    for batch in batches:
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        said, examples = distiller.teacher_outputs((), batch), distiller.examples(batch)
        if writer is None:
            names = [name for name in LOGITS if said.get(name) is not None]
            if not names:
                raise SparsityError(f"the teacher returns no logits to be cached, but {', '.join(said)}")
            # Few rows at once: those of a language model are a text times a vocabulary each.
            writer = ArrowWriter(path=str(folder / _ROWS), features=_features(names, dtype), writer_batch_size=_BATCH)
        for row in _rows(examples, {name: said[name] for name in names}, seen, dtype):
            writer.write(row)
    if writer is None:
        raise SparsityError("there are no training examples to ask the teacher about")
    writer.finalize()
    writer.close()
    facts = {
        "version": VERSION,
        "teacher": weights_fingerprint(distiller.teacher),
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "data": data_fingerprint(seen),
        "examples": len(seen),
        "logits": names,
        "dtype": dtype,
    }
    (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return len(seen)


def _features(names: Sequence[str], dtype: str) -> datasets.Features:
    columns: dict[str, Any] = {"key": datasets.Value("string")}
    for name in names:
        columns[name] = datasets.Sequence(datasets.Value(STORED[dtype]))
        columns[f"{name}_shape"] = datasets.Sequence(datasets.Value("int64"))
    return datasets.Features(columns)


def _rows(examples: Examples, said: Mapping[str, Tensor], seen: set[str], dtype: str) -> Iterator[dict[str, Any]]:
    masks = {name: examples.positions(name, tensor) for name, tensor in said.items()}
    for place, key in enumerate(examples.names()):
        if key in seen:
            continue
        seen.add(key)
        row: dict[str, Any] = {"key": key}
        for name, tensor in said.items():
            mask = masks[name]
            own = (tensor[place] if mask is None else tensor[place][mask[place]]).float().cpu().numpy()
            with np.errstate(over="ignore"):  # an error of its own, below
                stored = own.astype(STORED[dtype])
            if not np.isfinite(stored).all():
                raise SparsityError(f"the teacher's {name} are not finite as {dtype}; store them as fp32, or mend it")
            row |= {name: stored.reshape(-1), f"{name}_shape": list(own.shape)}
        yield row


def batches_of(
    dataset: TorchDataset[Any],
    collate: Callable[[list[Any]], Mapping[str, Any]],
    accepted: Iterable[str],
    size: int = 32,
) -> DataLoader[Any]:
    """Return all examples of a dataset in order, in batches as a Trainer makes them.

    Args:
        collate: the data collator.
        accepted: the names that the model's forward takes; other columns are left out.
    """
    known = {*accepted, "label", "label_ids"}  # a collator calls these "labels"

    def collated(rows: list[Any]) -> Mapping[str, Any]:
        return collate([{name: value for name, value in dict(row).items() if name in known} for row in rows])

    # A generator of its own, so that training draws the same numbers with a cache and without.
    return DataLoader(dataset, batch_size=size, collate_fn=collated, generator=torch.Generator())


def weights_fingerprint(model: nn.Module) -> str:
    """Return a number for the weights of a model, on whatever device they are."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a number for how a tokenizer cuts texts: its rules, or its vocabulary where it has no file of rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # What the last call has asked for, no property of the tokenizer.
        told: Any = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    else:
        told = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
    facts = [type(tokenizer).__name__, getattr(tokenizer, "padding_side", None), told]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def data_fingerprint(keys: Iterable[str]) -> str:
    """Return a number for a set of examples, in whatever order they come and however often each."""
    return hashlib.blake2b("".join(sorted(set(keys))).encode(), digest_size=16).hexdigest()
