"""Decode with steps in torch.compile and a static cache: the engines that `bench_decode.py --compile` adds."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch._dynamo.config as dynamo
from transformers import StaticCache


class Compiled:
    """The steps of a model in torch.compile, with a static cache; the prompt is read uncompiled."""

    def __init__(self, model: Any, ids: Any, tokens: int) -> None:
        self.model, self.ids, self.tokens = model, ids, tokens
        self.step = torch.compile(model, fullgraph=True)
        self.cache, self.other = (
            StaticCache(config=model.config, max_cache_len=ids.shape[1] + tokens + 1) for _ in range(2)
        )

    def next(self, call: Any, cache: Any, token: Any, place: int) -> Any:
        """Return the logits after a token."""
        where = torch.tensor([[place]])
        return call(input_ids=token, position_ids=where, past_key_values=cache, use_cache=True).logits

    def deviation(self) -> float:
        """Return the largest deviation from the model uncompiled, as a fraction of the largest logit."""
        worst = 0.0
        with torch.inference_mode():
            for cache in (self.cache, self.other):
                cache.reset()
                self.model(input_ids=self.ids[:, :1], past_key_values=cache, use_cache=True)
            for place in range(1, self.ids.shape[1]):
                token = self.ids[:, place : place + 1]
                exact = self.next(self.model, self.other, token, place)
                found = self.next(self.step, self.cache, token, place)
                worst = max(worst, float((found - exact).abs().max() / exact.abs().max()))
        return worst

    def __call__(self) -> float:
        with torch.inference_mode():
            self.cache.reset()
            out = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            for place in range(self.ids.shape[1], self.ids.shape[1] + self.tokens):
                token = self.next(self.step, self.cache, token, place)[:, -1:].argmax(-1)
            return (time.perf_counter() - start) / self.tokens


def compiled_engines(models: dict[str, Any], known: dict[str, dict[str, Any]], ids: Any, tokens: int) -> dict[str, Any]:
    """Return the compiled models by name, after a look at their logits."""
    # Models of one class count together, and the place of a token is compiled as a number first, then as any.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * len(models))
    engines: dict[str, Any] = {}
    for name, model in models.items():
        engine = Compiled(model, ids, tokens)
        off = engine.deviation()
        exact = not any(kind in name for kind in ("int8", "int4", "bfloat16"))
        if exact and off > 1e-4:
            sys.exit(f"{name}, compiled: the logits deviate by {off:.2e} of the largest")
        engines[f"{name}, compiled"] = engine
        same = {key: known[name][key] for key in ("bytes_per_token", "perplexity") if key in known[name]}
        known[f"{name}, compiled"] = same | {"compiled_logit_deviation": off}
    return engines
