"""Cached teacher logits or embeddings of every training example: run the teacher once, train often without it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import datasets
import torch
from datasets.arrow_writer import ArrowWriter
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from ...distillation.distiller import Distiller
from ...distillation.example_keys import PER_EXAMPLE, Examples
from ...errors import CheckpointError, SparsityError
from ...formats.safetensors_io import reading
from ...utils.atomic_io import read_json, require_regular, write_text
from ...utils.text import format_bytes, shorten
from ...utils.validation import check_integer, check_number, check_one_of, check_positive_int, check_text
from .teacher_rows import LOGITS, STORED, Layout, size_of

VERSION = 2
"""2 has a checksum for each example."""

_ROWS, _FACTS = "logits.arrow", "teacher_cache.json"
_BATCH = 32


class Written(NamedTuple):
    """What `write_cache` has written: examples, and bytes of their numbers."""

    examples: int
    size: int


class TeacherCache:
    """Logits of a teacher by example; takes the place of the teacher in a `Distiller`.

    Args:
        folder: as `write_cache` has made it.

    Raises:
        CheckpointError: if there is no complete cache in the folder, or a corrupted one, or of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            facts = read_json(self.folder / _FACTS)
            if facts is None:
                raise CheckpointError(f"{_FACTS} is missing")
            _check_version(facts)
            self.facts = _checked(facts)
            with reading(self.folder / _ROWS):
                require_regular(self.folder / _ROWS)
            rows = datasets.Dataset.from_file(str(self.folder / _ROWS))
            self.layout = Layout(
                tuple(self.facts["logits"]), self.facts["dtype"], self.facts["top"], self.facts["temperature"]
            )
            if rows.features != self.layout.features:
                raise CheckpointError(f"{_ROWS} has the columns {', '.join(rows.column_names)}")
            self._row = {key: row for row, key in enumerate(rows["key"])}
            if len(rows) != self.facts["examples"] or data_fingerprint(self._row) != self.facts["data"]:
                raise CheckpointError(f"the examples in {_ROWS} are not those that were written")
        except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
            raise CheckpointError(
                f"{self.folder} has no complete cache of a teacher ({error}). Create one: hf-sparse cache-teacher "
                f"RECIPE --output {self.folder}"
            ) from error
        self._rows = rows.with_format("numpy")

    @classmethod
    def open(cls, folder: str | Path, teacher: nn.Module, temperature: float) -> Self:
        """Open the cache and check that it is of this teacher.

        Args:
            temperature: of the soft targets; the most likely tokens alone are stored for one.

        Raises:
            CheckpointError: if it is not, or as the class.
        """
        cache = cls(folder)
        cache._compare("teacher", weights_fingerprint(teacher), "its weights are not those that the recipe names now")
        if cache.layout.top is not None and cache.layout.temperature != temperature:
            raise CheckpointError(
                f"the cache in {folder} holds the {cache.layout.top} most likely tokens at temperature "
                f"{cache.layout.temperature:g}, and `distillation.temperature` is {temperature:g}. Create it again: "
                f"hf-sparse cache-teacher RECIPE --output {folder} --top {cache.layout.top}"
            )
        return cache

    def check(self, tokenizer: Any, keys: Iterable[str] | None) -> None:
        """Raise `CheckpointError` if the cache was made with another tokenizer, or of other training data.

        Args:
            tokenizer: None = unknown; the examples, made of its tokens, are compared all the same.
            keys: of all training examples; None = unknown (a stream), then each is looked for when it comes.
        """
        if tokenizer is not None and self.facts["tokenizer"] is not None:
            self._compare("tokenizer", tokenizer_fingerprint(tokenizer), "it splits examples into other tokens")
        if keys is not None:
            self._compare("data", data_fingerprint(keys), "the training examples (or max_length) have changed")

    def _compare(self, what: str, found: str, why: str) -> None:
        if self.facts[what] != found:
            raise CheckpointError(
                f"the cache in {self.folder} was made with another {what}: {why} (fingerprint {found}, in the cache "
                f"{self.facts[what]}). Create it again: hf-sparse cache-teacher RECIPE --output {self.folder}"
            )

    def look_up(self, examples: Examples) -> dict[str, Any]:
        """Return the teacher logits of a batch, padded with zeros where the batch is.

        Raises:
            SparsityError: if an example is not in the cache.
            CheckpointError: if its logits are corrupted.
        """
        keys = examples.names()
        for index, key in enumerate(keys):
            if key not in self._row:
                raise SparsityError(
                    f"the cache in {self.folder} has no logits for example {index} of this batch (key {key}). "
                    "Examples that change while training (random masking, augmentation) "
                    "cannot be cached: leave distillation.cache out, or create the cache again from this data"
                )
        found = [self._verified(key) for key in keys]
        device = next(value.device for value in examples.inputs.values() if isinstance(value, Tensor))
        return self.layout.join({
            name: self._batched(name, [row[name] for row in found], examples).to(device) for name in self.layout.columns
        })  # fmt: skip

    def _verified(self, key: str) -> dict[str, Tensor]:
        """Return what is stored of an example by name.

        Raises:
            CheckpointError: if it is not what was written.
        """
        found = self.layout.read(self._rows[self._row[key]])
        if found is None:
            raise CheckpointError(
                f"the logits of example {key} in {self.folder} are corrupted: the checksum does not match. Create the "
                f"cache again: hf-sparse cache-teacher RECIPE --output {self.folder}"
            )
        return found

    def _batched(self, name: str, rows: Sequence[Tensor], examples: Examples) -> Tensor:
        if name in PER_EXAMPLE and rows[0].ndim < 2:
            return torch.stack(list(rows))
        mask = examples.targets if examples.writes else examples.inputs.get("attention_mask")
        if mask is None:  # nothing is padded
            return torch.stack(list(rows))
        mask = mask.bool().cpu()
        out = torch.zeros((*mask.shape, *rows[0].shape[1:]), dtype=rows[0].dtype)
        for index, row in enumerate(rows):
            out[index, mask[index]] = row
        return out


def _check_version(facts: Mapping[str, Any]) -> None:
    if facts.get("version") != VERSION:
        raise CheckpointError(f"it is of version {shorten(facts.get('version'))}, and this hf_sparse reads {VERSION}")


def _checked(facts: dict[str, Any]) -> dict[str, Any]:
    """Return what teacher_cache.json holds, if it is what `write_cache` writes there."""
    for key in ("teacher", "data"):
        check_text(key, facts.get(key), CheckpointError)
    if facts.get("tokenizer") is not None:
        check_text("tokenizer", facts["tokenizer"], CheckpointError)
    check_integer("examples", facts.get("examples"), "[1, inf)", CheckpointError)
    check_one_of("dtype", facts.get("dtype"), STORED, CheckpointError)
    logits = facts.get("logits")
    if not isinstance(logits, list) or not logits or logits != [name for name in LOGITS if name in logits]:
        raise CheckpointError(f"`logits` must be a list of {', '.join(LOGITS)}, got {shorten(logits)}")
    if facts.get("top") is not None:
        check_positive_int("top", facts["top"], CheckpointError)
        check_number("temperature", facts.get("temperature"), "(0, inf)", CheckpointError)
    return {"tokenizer": None, "top": None, "temperature": 1.0, **facts}


@torch.no_grad()
def write_cache(
    distiller: Distiller,
    batches: Iterable[Mapping[str, Any]],
    folder: str | Path,
    tokenizer: Any,
    dtype: str = "fp32",
    top: int | None = None,
) -> Written:
    """Run the teacher on every batch once, and write its logits without padding.

    The file that makes the cache complete is written last.

    Args:
        distiller: with the teacher, as for training.
        batches: of all training examples, in any order.
        tokenizer: None if there is none; for the check in `TeacherCache`.
        dtype: of the numbers on disk, "fp32" or "fp16" (half the size, not exact).
        top: store the log-probabilities of so many tokens, the most likely ones of each position, and that of all
            others together; None = all logits. A position then takes `8 k + 4` bytes (fp32) or `6 k + 2` (fp16).

    Raises:
        RecipeError: for an unknown dtype, or `top` where the teacher predicts no tokens.
        SparsityError: if the teacher returns no logits, or some that are not finite in this dtype, or more than fit on
            the disk.
    """
    check_one_of("dtype", dtype, STORED)
    if top is not None:
        check_positive_int("top", top)
    assert isinstance(distiller.teacher, nn.Module)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Removed and not written over: a training that reads the old rows has mapped their file, and keeps it so.
    for name in (_FACTS, _ROWS):
        (folder / name).unlink(missing_ok=True)
    device = next((parameter.device for parameter in distiller.teacher.parameters()), torch.device("cpu"))
    seen: set[str] = set()
    layout: Layout | None = None
    size = 0
    for batch in tqdm(batches, desc="Asking the teacher", disable=None):
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        outputs, examples = distiller.teacher_outputs((), batch), distiller.examples(batch)
        rows = None
        if layout is None:
            layout = Layout(_names(outputs), dtype, top, distiller.config.temperature)
            rows = list(layout.rows(examples, outputs, seen))
            _check_room(folder, batches, sum(map(size_of, rows)) / max(1, len(rows)))
            # Few rows at once: each one of a language model has (tokens, vocabulary) logits.
            writer = ArrowWriter(path=str(folder / _ROWS), features=layout.features, writer_batch_size=_BATCH)
        for row in layout.rows(examples, outputs, seen) if rows is None else rows:
            writer.write(row)
            size += size_of(row)
    if layout is None:
        raise SparsityError("there are no training examples to run the teacher on")
    writer.finalize()
    writer.close()
    facts = {
        "version": VERSION,
        "teacher": weights_fingerprint(distiller.teacher),
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "data": data_fingerprint(seen),
        "examples": len(seen),
        "logits": list(layout.names),
        "dtype": dtype,
    }
    if top is not None:
        facts |= {"top": top, "temperature": layout.temperature}
    write_text(folder / _FACTS, json.dumps(facts, indent=2) + "\n")
    return Written(len(seen), size)


def _names(outputs: Mapping[str, Any]) -> tuple[str, ...]:
    names = tuple(name for name in LOGITS if outputs.get(name) is not None)
    if not names:
        raise SparsityError(f"the teacher returns no logits to cache, only {', '.join(outputs)}")
    return names


def _check_room(folder: Path, batches: Any, each: float) -> None:
    """Raise `SparsityError` if all examples would take more than the disk has left, where their number is known.

    Args:
        each: bytes of an example.
    """
    try:
        count = len(batches.dataset)
    except (AttributeError, TypeError):  # a stream
        return
    free = shutil.disk_usage(folder).free
    if count * each > free:
        raise SparsityError(
            f"the logits of {count:,} examples take about {format_bytes(int(count * each))}, and {folder} has "
            f"{format_bytes(free)} left. Keep the most likely tokens of each position alone (--top 64), or fewer "
            "examples"
        )


def batches_of(
    dataset: TorchDataset[Any],
    collate: Callable[[list[Any]], Mapping[str, Any]],
    accepted: Iterable[str],
    size: int = 32,
) -> DataLoader[Any]:
    """Return all examples of a dataset in order, in batches as a Trainer makes them.

    Args:
        collate: the data collator.
        accepted: names of the arguments of the model's forward; other columns are left out.
    """
    known = {*accepted, "label", "label_ids"}  # a collator calls these "labels"

    def collated(rows: list[Any]) -> Mapping[str, Any]:
        return collate([{name: value for name, value in dict(row).items() if name in known} for row in rows])

    # A generator of its own, so that training draws the same numbers with a cache and without.
    return DataLoader(dataset, batch_size=size, collate_fn=collated, generator=torch.Generator())


def weights_fingerprint(model: nn.Module) -> str:
    """Return a number for the weights of a model, on whatever device they are."""
    digest = hashlib.blake2b(digest_size=16)
    model = getattr(model, "wrapped", model)  # `NamedOutputs`
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a number for how a tokenizer splits text: its rules, or its vocabulary where it has no file of rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # These two are options of the last call, not properties of the tokenizer.
        options = ("truncation", "padding")
        rules: Any = {key: value for key, value in json.loads(backend.to_str()).items() if key not in options}
    else:
        vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
        rules = vocabulary or (tokenizer.to_dict() if hasattr(tokenizer, "to_dict") else [])  # of an image processor
    facts = [type(tokenizer).__name__, getattr(tokenizer, "padding_side", None), rules]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def data_fingerprint(keys: Iterable[str]) -> str:
    """Return a number for a set of examples, in whatever order they come and however often each."""
    return hashlib.blake2b("".join(sorted(set(keys))).encode(), digest_size=16).hexdigest()
