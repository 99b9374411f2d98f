"""Loading a model as it was saved: the class that its config names, whatever its head, and its tokenizer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto

from ..errors import RecipeError, SparsityError
from ..formats.model_folder import check_index

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_DROPOUT = re.compile(r"(dropout|pdrop|dropout_prob|dropout_rate)$")


def load_whole(name: str, revision: str = "main", **options: Any) -> PreTrainedModel:
    """Load a model with the head it was saved with: the class its config names, registered ones too, else `AutoModel`.

    Args:
        name: folder or Hub name.
        revision: branch, tag or commit on the Hub.
        **options: for `from_pretrained`.

    Raises:
        RecipeError: if it cannot be loaded.
        CheckpointError: if it is packed, and corrupt.
    """
    with _readable(name):
        config = AutoConfig.from_pretrained(name, revision=revision)
        if not isinstance(config.architectures, list | None):
            raise RecipeError(
                f"cannot load model '{name}': `architectures` must be a list in its config.json, "
                f"got {config.architectures!r:.80}"
            )
        return model_class(config.architectures, config).from_pretrained(name, revision=revision, **options)


def load(factory: Any, name: str, revision: str = "main", **options: Any) -> PreTrainedModel:
    """Load a model with a class of the caller's, such as `AutoModelForSequenceClassification`.

    Raises:
        RecipeError, CheckpointError: as `load_whole`.
    """
    with _readable(name):
        model: PreTrainedModel = factory.from_pretrained(name, revision=revision, **options)
        return model


def dropout_options(name: str, revision: str, probability: float) -> dict[str, float]:
    """Return options for `from_pretrained` that give every dropout in a model's config one probability.

    Args:
        name: folder or Hub name.

    Raises:
        RecipeError: if the config cannot be read, or names no dropout.
    """
    with _readable(name):
        config = AutoConfig.from_pretrained(name, revision=revision).to_dict()
    named = [key for key, value in config.items() if _DROPOUT.search(key) and isinstance(value, (int, float))]
    if not named:
        raise RecipeError(f"`model.dropout` was given, but the config of '{name}' has no dropout; leave it out")
    return dict.fromkeys(named, probability)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what transformers raises for a model that cannot be loaded into a `RecipeError`."""
    check_found(name, "model")
    if Path(name).is_dir():
        check_index(Path(name), exist=False)
    try:
        yield
    except SparsityError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"cannot load model '{name}' ({_where(name)}): {error}") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise RecipeError(f"cannot load model '{name}': its weights do not fit its config.json: {error}") from error


def check_found(name: str, what: str, beside: Path | None = None) -> None:
    """Refuse a name that can be none on the Hub, where there is no such folder: the Hub would tell about its own names.

    Args:
        what: the name stands for.
        beside: folder where it was looked for too.

    Raises:
        RecipeError: naming where the folder was looked for.
    """
    path = Path(name)
    places = [path.absolute(), *([] if beside is None else [(beside / path).absolute()])]
    if path.is_file():
        raise RecipeError(f"cannot load {what} '{name}': {path.absolute()} is a file, and no folder or name on the Hub")
    if not path.is_dir() and not _HUB_NAME.fullmatch(name):
        raise RecipeError(
            f"cannot load {what} '{name}': there is no folder {' or '.join(map(str, places))}, and a name on the Hub "
            "is NAME or OWNER/NAME"
        )


def _where(name: str) -> str:
    """Return where a model was looked for."""
    if Path(name).is_dir():
        return "the folder has no complete model"
    return f"there is no folder {Path(name).absolute()}, and it is not available from the Hub"


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that is stored next to a model.

    Args:
        model: folder or Hub name.
        revision: branch, tag or commit on the Hub.

    Raises:
        RecipeError: if there is none.
    """
    check_found(model, "the tokenizer of model")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, revision=revision or "main")
    except (OSError, ValueError, KeyError) as error:
        where = "" if Path(model).is_dir() else f" ({_where(model)})"
        raise RecipeError(f"cannot load the tokenizer of model '{model}'{where}: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # What transformers makes up where there are no files: every text would become a row of [UNK].
        raise RecipeError(f"model '{model}' has no tokenizer beside it (tokenizer.json, vocab.txt, ...)")
    return tokenizer


def load_image_processor(model: str, revision: str | None = None) -> Any:
    """Load what prepares images for a model, stored next to it.

    Args:
        model: folder or Hub name.
        revision: branch, tag or commit on the Hub.

    Raises:
        RecipeError: if there is none.
    """
    check_found(model, "the image processor of model")
    try:
        return AutoImageProcessor.from_pretrained(model, revision=revision or "main")
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"cannot load the image processor of model '{model}': {error}") from error


def is_causal(model: Any) -> bool:
    """Return whether a model of transformers predicts the next token of a text, and has no encoder before it."""
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        return False
    return model.get_output_embeddings() is not None


def most_tokens(model: nn.Module) -> int | None:
    """Return how many tokens a model was made for; None where its config does not say.

    RoBERTa counts positions from the padding's on, so it takes fewer than its config says.
    """
    config: Any = model.config
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is None or longest < 1:  # XLNet says -1
        return None
    paddings = [table.padding_idx for table in _position_tables(model) if table.padding_idx is not None]
    return int(longest) - max((padding + 1 for padding in paddings), default=0)


def default_length(longest: int, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return as many tokens as model and tokenizer take, but not more than `longest`."""
    return min(longest, most_tokens(model) or longest, tokenizer.model_max_length)


def check_length(length: int, model: nn.Module, tokenizer: PreTrainedTokenizerBase, special: int | None = None) -> None:
    """Refuse examples of more tokens than the tokenizer allows, or than the model has positions in a table.

    Args:
        special: tokens that are added to each example; None = as many as the tokenizer adds.

    Raises:
        RecipeError: naming the most that can be taken, or what is not left.
    """
    most = tokenizer.model_max_length
    if any(True for _ in _position_tables(model)):  # what computes its positions can go on behind the last trained one
        most = min(most, most_tokens(model) or most)
    special = tokenizer.num_special_tokens_to_add() if special is None else special
    if length <= special:
        raise RecipeError(
            f"examples are cut at {length} tokens, of which the tokenizer adds {special}, so nothing of them is left: "
            "set data.max_length in a recipe, or --length on the command line"
        )
    if length > most:
        raise RecipeError(
            f"examples are cut at {length} tokens, but the model takes at most {most}: set data.max_length in a "
            "recipe, or --length on the command line"
        )


def _position_tables(model: nn.Module) -> Iterator[nn.Embedding]:
    for path, module in model.named_modules():
        if path.endswith(("position_embeddings", "embed_positions", "wpe")) and isinstance(module, nn.Embedding):
            yield module


def model_class(architectures: Any, config: Any) -> Any:
    """Return the class with that name, of transformers or registered with an auto class for this config.

    The name is from a file, so it must be a model and no more.
    """
    registered = {found.__name__: found for found in _registered(type(config))}
    for architecture in architectures if isinstance(architectures, list) else ():
        found = getattr(transformers, str(architecture), registered.get(str(architecture)))
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return AutoModel


def _registered(config_class: type) -> Iterator[type]:
    """Yield the models that auto classes have for a config: those of a user too (`AutoModelFor*.register`)."""
    for name, mapping in vars(modeling_auto).items():
        if name.endswith("_MAPPING") and config_class in mapping:
            found = mapping[config_class]
            yield from found if isinstance(found, tuple) else (found,)
