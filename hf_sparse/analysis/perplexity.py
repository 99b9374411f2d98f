"""Perplexity of causal language models on a text, alone or beside that of another model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..errors import RecipeError, SparsityError
from ..hf.auto import check_length, default_length, is_causal, load_tokenizer, load_whole
from ..recipe.texts import Bos, TokenStream, Window, read_text
from ..runtime import to_runtime

LENGTH = 2048
"""Tokens of a window by default, if the model takes as many."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What was measured. `print` it for a few lines.

    Attributes:
        model: name.
        value: `exp` of the mean negative log-likelihood of the scored tokens.
        tokens: that were scored.
        windows: number of them.
        length, stride: of the windows, in tokens.
        begins: how each window begins.
        against: the other model's, on the same windows.
        agreement: fraction of tokens where both models find the same token most likely.
        divergence: mean KL divergence of this model from the other one, in nats a token.
        backend: of the runtime form that this model was in, see `to_runtime`; None = as it was loaded.
    """

    model: str
    value: float
    tokens: int
    windows: int
    length: int
    stride: int
    begins: str
    against: Perplexity | None = None
    agreement: float | None = None
    divergence: float | None = None
    backend: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    def __str__(self) -> str:
        form = "" if self.backend is None else f", computed by {self.backend}"
        lines = [f"perplexity {self.value:.3f}  {self.model}{form}"]
        if self.against is not None:
            ratio = self.value / self.against.value
            lines.append(f"perplexity {self.against.value:.3f}  {self.against.model}")
            lines.append(
                f"ratio {ratio:.4f}, same most likely token {self.agreement:.2%}, KL divergence {self.divergence:.4f}"
            )
        lines.append(
            f"{self.tokens:,} tokens in {self.windows} windows of {self.length} tokens, stride {self.stride}, "
            f"{self.begins}"
        )
        return "\n".join(lines)


@torch.no_grad()
def window_logits(model: Any, window: Window) -> Tensor:
    """Return the logits that predict the scored tokens of a window, `(scored, vocabulary)`, in float32."""
    ids = window.ids.to(model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0, -window.scored - 1 : -1].float()


def mean_loss(model: Any, windows: Sequence[Window]) -> float:
    """Return the mean negative log-likelihood of the scored tokens, in nats.

    Raises:
        SparsityError: if it is not finite.
    """
    total, count = 0.0, 0
    for window in tqdm(windows, desc="Perplexity", disable=None):
        targets = window.ids[0, -window.scored :].to(model.device)
        total += float(F.cross_entropy(window_logits(model, window), targets, reduction="sum").double())
        count += window.scored
    if not math.isfinite(total):
        raise SparsityError("the loss of the model on this text is not finite: are there NaN among its weights?")
    return total / count


def compare(model: Any, other: Any, windows: Sequence[Window]) -> tuple[float, float]:
    """Return how often two models find the same token most likely, and the mean KL divergence of `model` from `other`.

    Raises:
        RecipeError: if they have different vocabularies.
    """
    same, divergence, count = 0, 0.0, 0
    for window in tqdm(windows, desc="Comparing", disable=None):
        ours, theirs = window_logits(model, window), window_logits(other, window).to(model.device)
        if ours.shape != theirs.shape:
            raise RecipeError(
                f"the models have {ours.shape[-1]} and {theirs.shape[-1]} tokens in their vocabularies, so their "
                "predictions cannot be compared"
            )
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        logs = ours.log_softmax(-1), theirs.log_softmax(-1)
        divergence += float(F.kl_div(*logs, reduction="sum", log_target=True).double())
        count += window.scored
    return same / count, max(0.0, divergence / count)  # rounding can bring equal models below 0


def perplexity(
    name: str,
    data: str,
    against: str | None = None,
    length: int | None = None,
    stride: int | None = None,
    samples: int | None = None,
    column: str = "text",
    bos: Bos = "auto",
    revision: str = "main",
    backend: str | None = None,
) -> Perplexity:
    """Load a causal language model, and another on request, and measure both on the same windows of a text.

    Args:
        name, against: folders or Hub names; the tokenizer is that of `name`.
        data: file with the text.
        length: tokens of a window; None = 2048, or what the model takes.
        stride: new tokens of each window; None = windows that do not overlap.
        samples: number of windows from the beginning of the text; None = all.
        column: of a file of examples.
        bos: see `TokenStream.of`.
        backend: bring the model `name` into runtime form first, as in "bitmask-int8"; `against` stays as it is, so that
            the same name there tells what rounding changes. Both are computed in float32 then.

    Raises:
        RecipeError: if a model or the text cannot be loaded, or a number does not fit the model.
        BackendError: if the model cannot be brought into that runtime form.
    """
    options = {} if backend is None else {"dtype": torch.float32}
    model, tokenizer = _causal(name, revision, **options), load_tokenizer(name, revision)
    length = default_length(LENGTH, model, tokenizer) if length is None else length
    check_length(length, model, tokenizer, special=0)
    stream = TokenStream.of(read_text(data, column), tokenizer, bos)
    windows = list(stream.windows(length, stride, samples))
    if not windows:
        raise RecipeError(f"{data} has {len(stream.ids)} tokens, too few to predict one from another")
    facts: dict[str, Any] = {
        "tokens": sum(window.scored for window in windows),
        "windows": len(windows),
        "length": length,
        "stride": stride or length - len(stream.prefix),
        "begins": stream.begins,
    }
    if backend is not None:
        to_runtime(model, backend)
    value = math.exp(mean_loss(model, windows))
    if against is None:
        return Perplexity(name, value, **facts, backend=backend)
    other = _causal(against, "main", **options)
    agreement, divergence = compare(model, other, windows)
    theirs = Perplexity(against, math.exp(mean_loss(other, windows)), **facts)
    return Perplexity(name, value, **facts, against=theirs, agreement=agreement, divergence=divergence, backend=backend)


def _causal(name: str, revision: str, **options: Any) -> Any:
    model = load_whole(name, revision, **options).eval()
    if not is_causal(model):
        raise RecipeError(
            f"'{name}' is a {type(model).__name__}, and perplexity is that of a model that predicts the next token: "
            "give a causal language model"
        )
    return model
