"""What a family of modeling/architectures promises, as one function over the family and a tiny model of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse import Pruner, SparsityConfig, compact, sparsify, to_dense_runtime, to_runtime
from hf_sparse.modeling.architectures import Attention, Family, FeedForward, SubBlock, known_experts, known_sub_blocks
from hf_sparse.modeling.architectures.filters import filters_in
from hf_sparse.modeling.layer_kinds import matrix_shape
from hf_sparse.runtime.fused_attention import FusedAttentionBlock, FusedSelfAttention
from hf_sparse.runtime.fused_ffn import FusedFeedForward
from hf_sparse.runtime.packed_linear import PackedLinear

Build = Callable[[], Any]
"""Makes a model of the family in `eval()`, the same one each time."""

Outputs = Callable[[Any], Tensor]
"""Model -> outputs for fixed inputs of at least 16 tokens, with and without padding."""


def check_family(family: Family, build: Build, outputs: Outputs, backend: str = "cpu") -> None:
    """Run every promise over one family.

    Raises:
        AssertionError: if one does not hold.
    """
    for check in (check_tables, check_pruning, check_compaction, check_removal_of_all):
        check(family, build, outputs)
    layers = [layer for block in blocks_of(family, build()) for layer in (*block.inputs.values(), block.output)]
    if all(isinstance(layer, nn.Linear) for layer in layers):  # the runtime packs no others
        check_runtime(family, build, outputs, backend)
        check_replacements(family, build, outputs, backend)


def check_tables(family: Family, build: Build, outputs: Outputs) -> None:
    """The tables find sub-blocks of both kinds, and what they name is what the model computes with."""
    model = build()
    blocks = blocks_of(family, model)
    kinds = {block.kind for block in blocks} | {block.kind for block in known_experts(model)}
    assert "attention" in kinds
    assert kinds & {"feed_forward", "experts"}
    assert len({block.name for block in blocks}) == len(blocks), "names are recipes' targets and keys of manifests"
    before = run(outputs, model)
    for block in blocks:
        assert block.groups > 1, "a contract over one head or neuron shows little"
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_submodule(block.output_name).weight.zero_()
        assert not torch.allclose(run(outputs, changed), before, atol=1e-4), f"{block.name} has no effect"


def check_pruning(family: Family, build: Build, outputs: Outputs) -> None:
    """A model that is masked in training has the outputs of the pruned model that it becomes."""
    model = build()
    config = SparsityConfig(sparsity=0.5, pattern="head+neuron", schedule="constant")
    pruner = Pruner(model, config).attach()
    pruner.step(1.0)
    masked = run(outputs, model)
    pruner.bake()
    close(run(outputs, model), masked)
    assert not torch.allclose(masked, run(outputs, build()), atol=1e-4), "nothing was pruned"


def check_compaction(family: Family, build: Build, outputs: Outputs) -> None:
    """Removing pruned heads and neurons leaves the outputs, and takes their weights away."""
    model = build()
    sparsify(model, SparsityConfig(sparsity=0.5, pattern="head+neuron"))
    pruned, before = run(outputs, model), {block.name: block.groups for block in blocks_of(family, model)}
    compact(model)
    close(run(outputs, model), pruned)
    after = {block.name: block.groups for block in blocks_of(family, model)}
    assert sum(after.values()) < sum(before.values())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  made here
        close(run(outputs, copied), pruned)


def check_removal_of_all(family: Family, build: Build, outputs: Outputs) -> None:
    """A sub-block that loses every head or neuron adds its output bias, and nothing else."""
    for name in [block.name for block in blocks_of(family, build())]:
        model = build()
        block = next(block for block in blocks_of(family, model) if block.name == name)
        with torch.no_grad():
            block.output.weight.zero_()
            for layer in block.inputs.values():
                for own in layer.parameters():
                    own.zero_()
        pruned = run(outputs, model)
        compact(model)
        assert matrix_shape(model.get_submodule(block.output_name))[1] == 0, name
        close(run(outputs, model), pruned)


def check_runtime(family: Family, build: Build, outputs: Outputs, backend: str) -> None:
    """The runtime form has the outputs of the dense model, fuses what is described, and restores every bit."""
    model = sparse(build)
    dense, state = run(outputs, model), {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    blocks = blocks_of(family, model)
    report = to_runtime(model, backend)
    kernels = {layer.name: layer.kernel.partition("_")[2] for layer in report.layers}
    for block in blocks:
        expected = ("qkv" if block.kind == "attention" else "ffn") if is_fused(block) else "linear"
        assert {kernels[name] for name in block.inputs} == {expected}, block.name
        if isinstance(block.table, Attention) and block.table.fusion is not None and is_fused(block):
            assert isinstance(block.core, FusedSelfAttention), block.name
            assert isinstance(block.module, FusedAttentionBlock) is (block.table.fusion.residual is not None), (
                block.name
            )
        elif isinstance(block.table, FeedForward) and is_fused(block):
            assert isinstance(block.module, FusedFeedForward), block.name
    close(run(outputs, model), dense)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  made here
        close(run(outputs, copied), dense)
    to_dense_runtime(model)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(run(outputs, model), dense)


def check_replacements(family: Family, build: Build, outputs: Outputs, backend: str) -> None:
    """A layer that is replaced in the runtime form is computed as it is, and a hook is called."""
    dense, fast = sparse(build), sparse(build)
    blocks = blocks_of(family, dense)
    names = [name for block in blocks for name in (*block.inputs, block.output_name)]
    to_runtime(fast, backend)
    before = run(outputs, fast)
    for name in names:
        for model in (dense, fast):
            model.get_submodule(name).register_forward_hook(scale)
    observed = run(outputs, dense)
    assert not torch.allclose(observed, before, atol=1e-4)
    close(run(outputs, fast), observed)
    dense, fast = sparse(build), sparse(build)
    to_runtime(fast, backend)
    for name in names:
        layer: Any = dense.get_submodule(name)
        other = replacement(layer)
        for model in (dense, fast):
            model.set_submodule(name, copy.deepcopy(other))
        close(run(outputs, fast), run(outputs, dense))
    assert not any(
        isinstance(module, PackedLinear) for block in blocks for module in [fast.get_submodule(block.output_name)]
    )


def blocks_of(family: Family, model: nn.Module) -> list[SubBlock]:
    """Return the sub-blocks of a model that a family describes."""
    tables = (*family.attentions, *family.feed_forwards)
    return [block for block in known_sub_blocks(model) if any(block.table is table for table in tables)]


def is_fused(block: SubBlock) -> bool:
    """Return whether the runtime has to compute the inputs of a sub-block together."""
    if isinstance(block.table, Attention):
        return not block.is_cross_attention and len(block.inputs) == 3
    return block.table.fusion is not None


def sparse(build: Build) -> Any:
    model = build()
    sparsify(model, SparsityConfig(sparsity=0.8))
    return model.eval()


def replacement(layer: nn.Linear) -> nn.Linear:
    """Return another layer of the same shape."""
    other = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    generator = torch.Generator().manual_seed(layer.in_features)
    with torch.no_grad():
        for own in other.parameters():
            own.copy_(torch.randn(own.shape, generator=generator) * layer.in_features**-0.5)
    return other.requires_grad_(False).eval()


def scale(_: Any, __: Any, out: Tensor) -> Tensor:
    """Scale an output; a forward hook that pickles."""
    return 1.25 * out


def run(outputs: Outputs, model: nn.Module) -> Tensor:
    """Return outputs of a model in `eval()`."""
    with torch.no_grad():
        return outputs(model.eval())


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


def load_example(source: str, name: str, folder: Any, modules: dict[str, Any]) -> Any:
    """Import the text of an architecture file from a folder, as `modules[name]` so that its classes can be pickled."""
    import importlib.util

    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logits(inputs: Mapping[str, Tensor]) -> Outputs:
    """Return a function that gives the logits of a model of transformers."""
    return lambda model: model(**inputs).logits


def check_filters(family: Family, build: Build, outputs: Outputs) -> None:
    """Pruned filters compute nothing while they are masked, and once they are gone; the next layers read fewer.

    Raises:
        AssertionError: if that does not hold.
    """
    model = build()
    blocks = filters_in(model, family.filters)
    assert blocks
    before, parameters = run(outputs, model), sum(own.numel() for own in model.parameters())
    sizes = {block.name: (block.groups, matrix_shape(block.output)[1]) for block in blocks}
    pruner = Pruner(model, SparsityConfig(sparsity=0.5, pattern="filter", schedule="constant")).attach()
    pruner.step(1.0)
    masked = run(outputs, model)
    assert not torch.allclose(masked, before, atol=1e-4), "nothing was pruned"
    pruner.bake()
    torch.testing.assert_close(run(outputs, model), masked, atol=1e-5, rtol=1e-5)
    compact(model)
    assert sum(own.numel() for own in model.parameters()) < parameters
    for block in filters_in(model, family.filters):
        filters, columns = sizes[block.name]
        assert block.groups == block.module.weight.shape[0] == filters // 2, block.name
        assert matrix_shape(block.output)[1] == columns * block.groups // filters, block.name
    for changed in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  made here
        torch.testing.assert_close(run(outputs, changed), masked, atol=1e-5, rtol=1e-5)
