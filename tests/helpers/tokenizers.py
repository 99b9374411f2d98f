"""Tokenizers of every kind, trained here on a few words, and what a vocabulary looks like from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

UNKNOWN = "[UNK]"
SPECIAL = ["[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]"]
CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "a fox and a dog were walking over the brown hills, quickly walked",
    "12 dogs; 37 foxes! jumping (twice) over walls",
    "d\u00e9j\u00e0 vu na\u00efve caf\u00e9 \u00fcber stra\u00dfe",
    "\u041c\u043e\u0441\u043a\u0432\u0430 \u0438 \u043c\u043e\u0441\u043a\u0432\u0438\u0447",
    "\u6f22\u5b57 \u4eee\u540d \u6f22\u8a9e",
)
TEMPLATE = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"}


def _wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    pairs = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(special_tokens=pairs, **TEMPLATE)
    roles = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **roles)


def word_piece(corpus: Iterable[str] = CORPUS, size: int = 300) -> PreTrainedTokenizerFast:
    """Return a tokenizer as BERT has it, cased."""
    backend = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    return _wrapped(backend)


def byte_bpe(corpus: Iterable[str] = CORPUS, size: int = 420) -> PreTrainedTokenizerFast:
    """Return a tokenizer as GPT-2 and Qwen have it: BPE of bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return _wrapped(backend)


def byte_fallback_bpe(corpus: Iterable[str] = CORPUS, size: int = 520) -> PreTrainedTokenizerFast:
    """Return a tokenizer as Gemma has it: BPE of characters, bytes for the others, no borders between words."""
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    own = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*SPECIAL, *own], show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # which never applies, as in Gemma
    return _wrapped(backend)


def suffix_bpe(corpus: Iterable[str] = CORPUS, size: int = 200) -> PreTrainedTokenizerFast:
    """Return a tokenizer as CLIP has it: the last character of a word is another symbol."""
    backend = Tokenizer(models.BPE(unk_token=UNKNOWN, end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    return _wrapped(backend)


def unigram(corpus: Iterable[str] = CORPUS, size: int = 160) -> PreTrainedTokenizerFast:
    """Return a tokenizer as T5 and XLM-R have it."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIAL, unk_token=UNKNOWN, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    return _wrapped(backend)


KINDS: dict[str, Callable[..., PreTrainedTokenizerFast]] = {
    "word_piece": word_piece,
    "byte_bpe": byte_bpe,
    "byte_fallback_bpe": byte_fallback_bpe,
    "suffix_bpe": suffix_bpe,
    "unigram": unigram,
}


def tokens_of(tokenizer: Any, sequence: str) -> list[str]:
    """Return the tokens of a sequence by their ids: Unigram spells unknown ones out."""
    backend = tokenizer.backend_tokenizer
    return [backend.id_to_token(token) for token in backend.encode(sequence, add_special_tokens=False).ids]


def is_covered(tokens: Sequence[str], vocab: dict[str, int]) -> bool:
    """Return whether a vocabulary has all of these tokens."""
    return all(token in vocab for token in tokens)
