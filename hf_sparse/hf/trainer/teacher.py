"""Where a teacher comes from: the model itself, a folder, the Hub; and whether it fits the student."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ...config.distillation import TERMS, DistillationConfig
from ...distillation.distiller import Distiller
from ...distillation.layer_map import fixed_pairs
from ...errors import RecipeError
from ..auto import load_whole
from ..embedding.pooling import Pooling, load_sentence_transformer
from ..embedding.wrapper import NamedOutputs, features_of, gives_embeddings, inner_model, is_wrapper
from .teacher_cache import TeacherCache, batches_of


def make_distiller(student: nn.Module, config: DistillationConfig, teacher: nn.Module | None = None) -> Distiller:
    """Load the teacher and check that it fits the student; call it while the student has no masks yet.

    Args:
        student: the model that is trained.
        config: where the teacher is, and what is compared.
        teacher: in place of `config.teacher`.

    Raises:
        RecipeError: if the teacher cannot be loaded, or its outputs cannot be compared with those of the student.
        CheckpointError: if there is a cache, but of another teacher.
    """
    if teacher is None and config.teacher == "self":
        # With a cache the teacher does not run: only its fingerprint is needed.
        teacher = student if config.cache is not None else copy.deepcopy(student)
    elif teacher is None:
        teacher = _loaded_wrapper(config, student) if is_wrapper(student) else _loaded(config)
    embeds = gives_embeddings(student)
    weights = config.weights(embeds)
    _check(student, teacher, config, weights)
    outputs: nn.Module | TeacherCache = NamedOutputs(teacher) if is_wrapper(teacher) else teacher
    if config.cache is not None:
        outputs = TeacherCache.open(config.cache, teacher, config.temperature)
    ours: Any = getattr(student, "config", None)
    writes = bool(getattr(ours, "is_encoder_decoder", False))
    # As the Trainer decides it: decoder-only models are trained on the next label.
    shifts = LOSS_MAPPING.get(str(getattr(student, "loss_type", None))) is ForCausalLMLoss and not writes
    return Distiller(
        outputs,
        config,
        shifts_labels=shifts,
        decoder_inputs=getattr(student, "prepare_decoder_input_ids_from_labels", None) if writes else None,
        problem_type=lambda: getattr(ours, "problem_type", None),
        embeds=embeds,
        pools=_pools(student, teacher, weights),
    )


def _pools(student: nn.Module, teacher: nn.Module, weights: Mapping[str, float]) -> tuple[Pooling, Pooling] | None:
    """Return what makes embeddings of the outputs of two models without a head, where any are compared."""
    if not isinstance(student, PreTrainedModel) or not isinstance(teacher, PreTrainedModel):
        return None
    if not any(TERMS[name].embeds for name in weights):
        return None
    ours = Pooling.of(student)
    return ours, ours if teacher.config._name_or_path == student.config._name_or_path else Pooling.of(teacher)


def check_cache(distiller: Distiller, trainer: Trainer) -> None:
    """Check a cached teacher against the tokenizer and the data of a Trainer; without a cache, do nothing.

    Raises:
        CheckpointError: if it was made with others.
    """
    cache, data = distiller.teacher, trainer.train_dataset
    if not isinstance(cache, TeacherCache):
        return
    cache.check(trainer.processing_class, None)
    if data is None or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        return  # a stream: each example is looked for when it comes
    assert trainer.model is not None
    batches: Iterable[Mapping[str, Any]]
    if is_wrapper(trainer.model):
        batches = wrapper_batches(trainer, data)
    else:
        accepted = inspect.signature(trainer.model.forward).parameters
        batches = batches_of(data, trainer.data_collator, accepted, trainer.args.eval_batch_size)
    cache.check(None, (key for batch in batches for key in distiller.examples(batch).names()))


def wrapper_batches(trainer: Any, data: Any) -> Iterator[dict[str, Any]]:
    """Yield all examples of a dataset, as a Trainer of sentence-transformers hands them to its model."""
    size = trainer.args.eval_batch_size
    for start in range(0, len(data), size):
        rows = [data[index] for index in range(start, min(start + size, len(data)))]
        yield from features_of(trainer, trainer.model, trainer.data_collator(rows))


def _loaded(config: DistillationConfig) -> PreTrainedModel:
    options: dict[str, Any] = {}
    if config.load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if "attention" in config.weights():
        options["attn_implementation"] = "eager"
    model: Any = load_whole(config.teacher, config.revision or "main", output_loading_info=True, **options)
    teacher, loading = model
    if missing := sorted(loading["missing_keys"]):
        raise RecipeError(
            f"distillation: teacher '{config.teacher}' has no weights for {len(missing)} parameters of "
            f"{type(teacher).__name__} (first: {missing[0]}), so its outputs would be random. Fine-tune it first, or "
            "choose another teacher"
        )
    return cast(PreTrainedModel, teacher)


def _loaded_wrapper(config: DistillationConfig, student: nn.Module) -> nn.Module:
    """Load a teacher of the class of a student of sentence-transformers."""
    options: dict[str, Any] = {}
    if config.load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if "attention" in config.weights():
        options["attn_implementation"] = "eager"
    teacher = load_sentence_transformer(
        config.teacher, type(student).__name__, revision=config.revision, device="cpu", model_kwargs=options
    )
    inner: Any = inner_model(teacher)
    if not gives_embeddings(teacher) and type(inner).__name__ not in (inner.config.architectures or ()):
        raise RecipeError(
            f"distillation: teacher '{config.teacher}' was not saved as {type(inner).__name__}, so its head would be "
            "random. Fine-tune it first, or choose another teacher"
        )
    return cast(nn.Module, teacher)


def _check(student: nn.Module, teacher: nn.Module, config: DistillationConfig, weights: Mapping[str, float]) -> None:
    """Raise `RecipeError` for what is known to differ before any batch was seen."""
    ours, theirs = getattr(student, "config", None), getattr(teacher, "config", None)
    headless = gives_embeddings(teacher)
    if "logits" in weights and headless and not gives_embeddings(student):
        raise RecipeError(
            f"distillation: the teacher ({type(teacher).__name__}) has no head, so it returns no logits. Give a model "
            "that was fine-tuned for the task, or set logits_weight: 0 and give hidden_weight"
        )
    if ours is None or theirs is None:
        return  # modules of the user's own; the shapes of outputs are checked at each batch
    if "logits" in weights:
        for name in ("num_labels", "vocab_size"):
            _same(name, ours, theirs, "logits cannot be compared; set logits_weight: 0, or choose another teacher")
    if "hidden" in weights:
        _same("hidden_size", ours, theirs, "hidden states cannot be compared; set hidden_weight: 0")
    if "attention" in weights:
        _same("num_attention_heads", ours, theirs, "attention maps cannot be compared; set attention_weight: 0")
        for who, side in (("model", ours), ("teacher", theirs)):
            if (implementation := getattr(side, "_attn_implementation", None)) != "eager":
                raise RecipeError(
                    f"distillation of attention maps needs them, and the {who} computes none with "
                    f'attn_implementation="{implementation}"; load it with attn_implementation="eager"'
                )
    if "hidden" in weights or "attention" in weights:
        layers = [getattr(side, "num_hidden_layers", None) for side in (ours, theirs)]
        if all(isinstance(count, int) for count in layers):
            fixed_pairs(config, *cast(list[int], layers))


def _same(name: str, student: Any, teacher: Any, otherwise: str) -> None:
    ours, theirs = getattr(student, name, None), getattr(teacher, name, None)
    if ours is not None and theirs is not None and ours != theirs:
        raise RecipeError(f"distillation: the teacher has {name}={theirs} and the model {name}={ours}, so {otherwise}")
