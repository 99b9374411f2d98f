"""SparseConfig: what transformers keeps as the `quantization_config` of a sparse model.

A checkpoint has one, and `from_pretrained` may be given another. transformers then keeps that of the checkpoint, except
for the attributes that classes on a list of its own name in `get_loading_attributes`. `SparseConfig` puts itself on
that list: the manifest comes from the checkpoint, and further pruning or a second quantization from the caller. (Should
the list be gone one day, transformers warns that it uses the config of the checkpoint, and a test here fails.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from transformers import BitsAndBytesConfig
from transformers.quantizers import auto, register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...config.sparsity import SparsityConfig
from ...errors import RecipeError
from ...formats.manifest import Manifest
from ...runtime import backends
from ...utils.validation import check_bool
from .. import patches

METHOD = "hf_sparse"


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):
    """Say how a model is sparse, as `quantization_config` of `from_pretrained` and in `config.json`.

    Given for a checkpoint that is packed already, it prunes it further, once it is loaded.

    Args:
        intent: a `SparsityConfig` or its `to_dict()`; instead of it, its keywords can be given.
        manifest: what the checkpoint contains; written by saving, never by hand.
        quantization_config: a `BitsAndBytesConfig`: the weights are decoded, pruned if requested, and then
            quantized. Zeros stay zeros. The model is one of bitsandbytes from then on, and saves and loads as such.
        backend: one of `hf_sparse.to_runtime` ("cpu-int8" and "bitmask-int8" are not exact): once the model is
            loaded, and pruned if requested, it is brought into runtime form for inference, as by that function. A
            setting of the load only: it is not saved.
        keep_zeros: the zeros of the weights stay zero in training, as by `hf_sparse.keep_zeros`. For dense files with
            zeros; a packed checkpoint keeps them anyway. A setting of the load only.
        **sparsity: the keywords of `SparsityConfig`.

    Raises:
        RecipeError: as `SparsityConfig`, or for a second quantization by anything but bitsandbytes.

    Example:
        >>> from hf_sparse import SparseConfig
        >>> SparseConfig(sparsity=0.5, scorer="magnitude", pattern="2:4").to_dict()["intent"]
        {'groups': [{'pattern': '2:4', 'sparsity': 0.5}]}
    """

    def __init__(
        self,
        intent: SparsityConfig | Mapping[str, Any] | None = None,
        manifest: Manifest | Mapping[str, Any] | None = None,
        quantization_config: BitsAndBytesConfig | Mapping[str, Any] | None = None,
        quant_method: str = METHOD,
        backend: str | None = None,
        keep_zeros: bool = False,
        **sparsity: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        if sparsity and intent is not None:
            raise RecipeError(f"give either intent or its keywords, not both: {', '.join(sorted(sparsity))}")
        if sparsity:
            intent = SparsityConfig(**sparsity)
        elif isinstance(intent, Mapping):
            intent = SparsityConfig.from_dict(intent)
        for key, value, kind in (("intent", intent, SparsityConfig), ("manifest", manifest, Manifest)):
            if value is not None and not isinstance(value, (kind, Mapping)):
                raise RecipeError(
                    f"`{key}` must be a {kind.__name__} or a mapping as its to_dict() gives, got {value!r:.80}"
                )
        self.intent = intent
        self.manifest = Manifest.from_dict(manifest) if isinstance(manifest, Mapping) else manifest
        self.quantization_config = _bitsandbytes(quantization_config)
        self.prune_to: SparsityConfig | None = None
        if backend is not None and backend not in backends():
            raise RecipeError(f"`backend` must be one of {', '.join(map(repr, backends()))}, got {backend!r}")
        if backend is not None and self.quantization_config is not None:
            raise RecipeError(
                f"backend={backend!r} packs float32 weights, and quantization_config asks for other ones: give one of "
                "the two"
            )
        self.backend = backend
        check_bool("keep_zeros", keep_zeros)
        if keep_zeros and (intent is not None or self.quantization_config is not None or backend is not None):
            raise RecipeError(
                "`keep_zeros` is for training a model with the zeros it has: give it alone, without sparsity, "
                "quantization_config or backend"
            )
        self.keep_zeros = keep_zeros
        self.stated: dict[str, Any] = {}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from plain JSON types, a mapping that the user gave or `config.json`.

        The options of the caller are put aside (`stated`), because only the quantizer knows which of the two it
        was: a file has none to give, least of all for weights that are not exact.
        """
        rest = {key: value for key, value in config_dict.items() if key not in _CALLER_OPTIONS}
        stated = {key: config_dict[key] for key in _CALLER_OPTIONS if config_dict.get(key) is not None}
        made = super().from_dict(rest, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]
        (made[0] if return_unused_kwargs else made).stated = stated
        return made

    def take_stated(self) -> None:
        """Take the options of a mapping that the user gave.

        Raises:
            RecipeError: as the constructor.
        """
        if self.stated:
            stated_config = SparseConfig(self.intent, **self.stated)
            self.backend, self.quantization_config, self.stated = (
                stated_config.backend,
                stated_config.quantization_config,
                {},
            )
            self.keep_zeros = stated_config.keep_zeros

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what counts of a config that is given for a checkpoint with one of its own."""
        return {
            "prune_to": self.intent,
            "quantization_config": self.quantization_config,
            "backend": self.backend,
            "keep_zeros": self.keep_zeros,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        out: dict[str, Any] = {"quant_method": METHOD}
        if self.intent is not None:
            out["intent"] = self.intent.to_dict()
        if self.manifest is not None:
            out["manifest"] = self.manifest.to_dict()
        if self.quantization_config is not None:
            out["quantization_config"] = self.quantization_config.to_dict()
        elif "quantization_config" in self.stated:
            out["quantization_config"] = self.stated["quantization_config"]
        return out


_CALLER_OPTIONS = ("backend", "quantization_config", "keep_zeros")


def _bitsandbytes(config: BitsAndBytesConfig | Mapping[str, Any] | None) -> BitsAndBytesConfig | None:
    if isinstance(config, Mapping) and (config.get("load_in_8bit") or config.get("load_in_4bit")):
        return BitsAndBytesConfig.from_dict(dict(config))
    if config is None or isinstance(config, BitsAndBytesConfig):
        return config
    raise RecipeError(
        f"quantization_config of SparseConfig is a BitsAndBytesConfig, not {type(config).__name__}: sparse weights can "
        "be quantized by bitsandbytes only"
    )


def merge_configs(original: Callable[..., Any], stored: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap `AutoHfQuantizer.merge_quantization_configs`: without its warning where a `SparseConfig` is given."""
    if not isinstance(given, SparseConfig):
        return original(stored, given, *args, **kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        return original(stored, given, *args, **kwargs)


patches.append(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", SparseConfig)
patches.wrap(auto.AutoHfQuantizer, "merge_quantization_configs", merge_configs)
