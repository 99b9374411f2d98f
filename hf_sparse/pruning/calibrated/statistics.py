"""What is known of the inputs of a layer on calibration data: sums over tokens, and no token itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...errors import SparsityError
from ...modeling.layer_kinds import KeptTokens, MatrixLayer, kind_of, matrix_shape
from ..processes import are_several, sum_of_counts, sum_over_processes


def compute_type(weight: Tensor) -> torch.dtype:
    """Return the type in which sums are kept: float32, or float64 for weights in float64."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class InputStatistics:
    """Sums over the inputs `x` of a layer, one row for each token.

    Args:
        columns: number of input features.
        products: whether to keep `sum x xᵀ`, which takes `columns` squared numbers; else only `sum x²`.
        dtype: of `products`.
        device: of `products`.

    Attributes:
        tokens: how many rows were added.

    Example:
        >>> inputs = InputStatistics(2, products=True)
        >>> inputs.add(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
        >>> inputs.norms.tolist(), inputs.hessian().tolist()
        ([5.0, 1.0], [[25.0, 4.0], [4.0, 1.0]])
    """

    def __init__(
        self, columns: int, products: bool, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        self.tokens = 0
        self.dtype = dtype
        self._products = torch.zeros(columns, columns, dtype=dtype, device=device) if products else None
        self._squares = torch.zeros(columns, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        """Add inputs, the features in the last dimension."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(self.dtype)
        self.tokens += len(rows)
        if self._products is not None:
            self._products.addmm_(rows.t(), rows)
        else:
            self._squares += rows.square().sum(0).double().cpu()

    def sum_over_processes(self) -> None:
        """Add up what all processes have seen."""
        self.tokens = sum_of_counts(self.tokens)
        sum_over_processes(self._squares if self._products is None else self._products)

    def checked(self, name: str) -> InputStatistics:
        """Return itself.

        Args:
            name: of the layer, for the message.

        Raises:
            SparsityError: if an input was not finite.
        """
        if not bool(self.squares.isfinite().all()):
            raise SparsityError(
                f"the inputs of '{name}' on the calibration batches are not finite. Are there NaN among the weights "
                "that were loaded, or does float16 overflow? Load the model in float32 or bfloat16"
            )
        return self

    @property
    def squares(self) -> Tensor:
        """`sum x²` of each feature, in float64 on the CPU."""
        return self._squares if self._products is None else self._products.diagonal().double().cpu()

    @property
    def norms(self) -> Tensor:
        """`‖x_j‖₂` of each feature over all tokens."""
        return self.squares.sqrt().to(self.dtype)

    def hessian(self) -> Tensor:
        """Return a copy of `H = 2/n sum x xᵀ`, the second derivative of the layer's squared output error.

        Raises:
            SparsityError: if the products were not kept.
        """
        if self._products is None:
            raise SparsityError("these statistics have no products of inputs: create them with products=True")
        return self._products * (2.0 / max(1, self.tokens))


def check_part(name: str, called: bool, tokens: int) -> None:
    """Raise `SparsityError` if nothing is known of the inputs of a layer.

    Args:
        called: whether it was.
        tokens: that it was given, without padding.
    """
    if not called:
        raise not_called(name)
    if not tokens:
        raise SparsityError(
            f"every token that '{name}' was given is padding: the attention_mask of the calibration batches is 0 "
            "everywhere. Give batches with text"
        )


def not_called(name: str) -> SparsityError:
    """Return the error about a layer that no batch has called."""
    return SparsityError(
        f"'{name}' took no part in the forward passes over the calibration batches, so nothing is known of its inputs: "
        "no batch reaches it, or the model reads its weight without calling it (as `dt_proj` of Mamba layers). Give "
        f"batches that use it, or leave it out: exclude: ['*.{name.rpartition('.')[2]}']"
    )


class UnsharedInputError(Exception):
    """Layers that had one input in the first call had different ones later."""


class InputObserver:
    """Forward hooks that gather statistics of the inputs of layers. Layers that are given the same tensor share them.

    Args:
        layers: by name.
        with_products: names of those that need the products of their inputs.
        share: whether layers with one input have one `InputStatistics`, as query, key and value should.
    """

    def __init__(self, layers: Mapping[str, MatrixLayer], with_products: Iterable[str], share: bool = True) -> None:
        self.layers = dict(layers)
        self.with_products = set(with_products)
        self.share = share
        self.found: dict[str, InputStatistics] = {}
        self._leader: dict[str, str] = {}
        self._inputs: list[tuple[Tensor, int, str, bool]] = []
        self._kept: KeptTokens = lambda inputs: None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> InputObserver:
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._inputs.clear()

    @property
    def leaders(self) -> dict[str, str]:
        """The layer whose statistics each layer that was called has; its own, if it shares none."""
        return dict(sorted(self._leader.items()))

    def sum_over_processes(self) -> None:
        """Add up what all processes have seen, also of layers that one of them never called (experts)."""
        if not are_several():
            return
        seen: set[int] = set()
        for name, layer in self.layers.items():
            if name not in self.found:
                self.found[name] = self._nothing(layer, name in self.with_products)
            if id(self.found[name]) not in seen:
                seen.add(id(self.found[name]))
                self.found[name].sum_over_processes()

    def begin(self, kept: KeptTokens) -> None:
        """Forget the inputs of the call before; called once for each batch.

        Args:
            kept: which tokens of this batch count.
        """
        self._inputs.clear()
        self._kept = kept

    def of(self, name: str) -> InputStatistics:
        """Return the statistics of a layer.

        Raises:
            SparsityError: if it was never called, or had inputs that are not finite.
        """
        inputs = self.found.get(name)
        check_part(name, called=inputs is not None, tokens=0 if inputs is None else inputs.tokens)
        assert inputs is not None
        return inputs.checked(name)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._observe(name, args[0])

        return hook

    def _observe(self, name: str, inputs: Tensor) -> None:
        same = next((entry for entry in self._inputs if _same(entry, inputs)), None) if self.share else None
        first = name not in self._leader
        if first:
            # Who leads must have had its own first call in this forward pass, or it has seen more than this layer.
            self._leader[name] = same[2] if same is not None and same[3] else name
        leader = self._leader[name]
        if leader != name:
            if same is None or same[2] != leader:
                raise UnsharedInputError(name)
            if name in self.with_products and self.found[leader]._products is None:
                raise UnsharedInputError(name)
            self.found[name] = self.found[leader]
            return
        if first:
            layer = self.layers[name]
            # All that share have products, if one of them needs them: who follows is not known yet.
            products = name in self.with_products or (self.share and bool(self.with_products))
            self.found[name] = self._nothing(layer, products)
        self._inputs.append((inputs, inputs._version, name, first))
        kept, of_layer = self._kept(inputs), kind_of(self.layers[name])
        rows = inputs if of_layer is None else of_layer.input_rows(self.layers[name], inputs)
        self.found[name].add(rows if kept is None else rows[kept])

    def _nothing(self, layer: MatrixLayer, products: bool) -> InputStatistics:
        return InputStatistics(matrix_shape(layer)[1], products, compute_type(layer.weight), layer.weight.device)


def _same(entry: tuple[Tensor, int, str, bool], inputs: Tensor) -> bool:
    """Return whether a tensor has the very values of one that was seen in this forward pass."""
    seen, version, _, _ = entry
    return (
        seen.data_ptr() == inputs.data_ptr()
        and seen.shape == inputs.shape
        and seen.stride() == inputs.stride()
        and version == inputs._version
    )
