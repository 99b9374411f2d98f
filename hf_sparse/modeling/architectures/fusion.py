"""What the runtime has to know of a family to compute a sub-block in one operator. All of it is optional.

A sub-block without such a description still computes with its layers packed one by one.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ResidualNorm:
    """The end of a sub-block: `norm(dropout(output(hidden)) + residual)`.

    Args:
        module: path of the module whose `forward(hidden, residual)` computes this. It holds the output layer.
        dropout: path of the dropout, below the same module as `module` is.
        norm: path of the layer norm, likewise.
    """

    module: str
    dropout: str
    norm: str


@dataclasses.dataclass(frozen=True)
class AttentionFusion:
    """A self-attention that the runtime can compute in one operator.

    The core is a module with `forward(hidden_states, attention_mask=None, **kwargs)` that returns a tuple of the output
    and None: softmax(scale * Q K^T + mask) V by `scaled_dot_product_attention`, without position bias.

    Args:
        cores: names of the classes of the core, exactly; a subclass may compute something else.
        scale: attribute of the core with the factor of the attention scores.
        causal: attribute of the core that is true if it hides later positions; then it is not fused.
        config: attribute of the core with the config that names the attention implementation.
        core_has_output: whether the forward of the core ends with the output layer.
        blocks: names of classes of the module around the core whose forward is the core followed by `residual`.
        residual: what follows the core in such a module.
    """

    cores: frozenset[str]
    scale: str = "scaling"
    causal: str = "is_causal"
    config: str = "config"
    core_has_output: bool = False
    blocks: frozenset[str] = frozenset()
    residual: ResidualNorm | None = None


@dataclasses.dataclass(frozen=True)
class FeedForwardFusion:
    """A feed-forward sub-block that the runtime can compute in one operator.

    Args:
        method: name of the method of the module that computes the sub-block: `method(hidden_states) -> Tensor`.
        inner_dropout: path of a dropout between the activation and the output layer.
        output_dropout: path of a dropout after the output layer.
        residual: layer norm and residual at the end of `method`.
        reads_output_weight: whether `method` reads `output.weight` (T5 looks at its dtype), which would unpack it in
            every call; then the runtime computes the sub-block itself, also where only some of its layers are packed.
        chunks: whether `forward` calls `method` by `apply_chunking_to_forward`, which reads its signature at each call.
        attention: path of the attention before it, where `forward` is that of `BertLayer`; None for `forward(input)`.
    """

    method: str
    inner_dropout: str | None = None
    output_dropout: str | None = None
    residual: ResidualNorm | None = None
    reads_output_weight: bool = False
    chunks: bool = False
    attention: str | None = None
