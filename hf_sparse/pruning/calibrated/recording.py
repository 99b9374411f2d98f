"""How blocks are called: their arguments are recorded in one pass that computes no block but the first.

Blocks of one model are called with arguments that differ by layer type (sliding and full attention have their own masks
and rotary embeddings), so each block has its own record. T5 hands a position bias on that its first block computes;
the first block is run for that reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ...errors import SparsityError
from ...modeling.class_swap import Swapped, restore, swap_class
from .activations import moved

Batch = Mapping[str, Any]


class Stop(BaseException):
    """Ends a forward pass when all that was wanted has happened. No error, so that no `except Exception` takes it."""


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call of a block, without its hidden states.

    Args:
        place: of the hidden states: 0 = the first positional argument, or the name of a keyword.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int | str

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block and return its hidden states."""
        if self.place == 0:
            return hidden_of(block(hidden, *self.args, **self.kwargs))
        return hidden_of(block(*self.args, **{**self.kwargs, str(self.place): hidden}))

    def on(self, device: torch.device | None) -> Call:
        """Return the call with its arguments on a device; None = where they are."""
        return self if device is None else Call(moved(self.args, device), moved(dict(self.kwargs), device), self.place)

    def gives(self, tensor: Tensor) -> bool:
        """Return whether a tensor is one of the arguments, as the states of an encoder are."""
        given = (*self.args, *self.kwargs.values())
        return any(isinstance(value, Tensor) and value.data_ptr() == tensor.data_ptr() for value in given)


@dataclasses.dataclass
class Recording:
    """All calls of a chain of blocks.

    Args:
        calls: for each block one for each batch.
        hidden: what went into the first block, for each batch.
    """

    calls: list[list[Call]]
    hidden: list[Tensor]


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states of what a block returned: alone, or first of a tuple."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def run_model(model: nn.Module, batch: Batch) -> None:
    """Run a model on a batch without caches, until it ends or is stopped."""
    known = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    caches = "use_cache" in known or (takes_any and bool(getattr(getattr(model, "config", None), "use_cache", False)))
    try:
        with contextlib.suppress(Stop):
            model(**{**({"use_cache": False} if caches else {}), **batch})
    except ValueError as error:
        given = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and not any(k in batch for k in given):
            raise SparsityError(
                f"{type(model).__name__} has a decoder, and the batches have {', '.join(batch)}: add "
                f"`labels` or `decoder_input_ids` ({error})"
            ) from error
        raise


def record(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Batch], device: torch.device | None = None
) -> Recording | None:
    """Record the calls of blocks that hand their hidden states to each other.

    Args:
        blocks: in the order of their calls.
        device: of the first block, the only one that is computed, if the rest of the model is somewhere else.

    Returns:
        None if they form no such chain: one is called twice or not at all, or the model changes hidden states between
        two of them.
    """
    chain = _Chain(blocks, device)
    with chain.recording():
        for number, batch in enumerate(batches):
            chain.begin(ends=number > 0)
            try:
                run_model(model, batch)
            except Exception:
                if chain.next != len(blocks):  # what comes after the blocks does not matter
                    raise
            if chain.broken or chain.next != len(blocks):
                return None
    return Recording(chain.calls, chain.hidden)


def encoded(
    model: Any, blocks: Sequence[nn.Module], batch: Batch, hidden: Tensor, device: torch.device | None = None
) -> Any:
    """Return what the encoder of a model gives for a batch, when its last block gives these hidden states.

    No block is computed but the first, for what it hands on beside them.

    Args:
        blocks: all of the encoder, in the order of their calls.
        device: of the first block, if the rest of the model is somewhere else.
    """
    found: list[Any] = []
    rest: list[tuple[Any, ...] | None] = []

    def replaced(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not rest:
            output = _run_on(device, forward, args, kwargs)
            rest.append(tuple(output[1:]) if isinstance(output, tuple) else None)
        return hidden if rest[0] is None else (hidden, *rest[0])

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output)
        raise Stop

    handle = model.get_encoder().register_forward_hook(keep)
    try:
        with replacing(blocks, [replaced] * len(blocks)):
            run_model(model, batch)
    finally:
        handle.remove()
    return found[0]


@contextlib.contextmanager
def replacing(blocks: Sequence[nn.Module], recorders: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let something else take the calls of blocks; it is given the plain call, and its arguments."""
    try:
        for block, recorder in zip(blocks, recorders, strict=True):
            vars(block)["recorder"] = recorder
            swap_class(block, Recorded)
        yield
    finally:
        for block in blocks:
            restore(block, Recorded)


class Recorded(Swapped):
    """Mixin of blocks whose calls are recorded; hooks of a block that is not computed do not run either.

    Attributes:
        recorder: takes the plain call and its arguments.
    """

    instance_attributes: ClassVar[tuple[str, ...]] = ("recorder",)
    recorder: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = cast(Any, super()).__call__
        return self.recorder(call, *args, **kwargs)


class _Chain:
    """Takes the calls of each block while they are recorded."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device | None) -> None:
        self.blocks, self.device = list(blocks), device
        self.calls: list[list[Call]] = [[] for _ in blocks]
        self.hidden: list[Tensor] = []
        self.begin(ends=True)

    def begin(self, ends: bool) -> None:
        """Begin a batch.

        Args:
            ends: whether it ends with the last block; else it goes on, to show whether one is called again.
        """
        self.next, self.broken, self.ends = 0, False, ends
        self._returned: Tensor | None = None
        self._rest: tuple[Any, ...] | None = None

    def recording(self) -> contextlib.AbstractContextManager[None]:
        return replacing(self.blocks, [self._recorder(index) for index in range(len(self.blocks))])

    def _recorder(self, index: int) -> Callable[..., Any]:
        def recorded(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            found = _call(args, kwargs)
            if found is None or index != self.next or not self._continues(found[1]):
                self.broken = True
                raise Stop
            call, hidden = found
            self.next += 1
            earlier = self.calls[index][0] if self.calls[index] else None
            if index == 0:
                self.hidden.append(hidden.detach().clone())
            computed = index == 0 and not (self.ends and len(self.blocks) == 1)
            output = _run_on(self.device, forward, args, kwargs) if computed else None
            self.calls[index].append(call if earlier is None else _shared(call, earlier))
            if self.ends and self.next == len(self.blocks):
                raise Stop
            if index == 0:
                self._rest = tuple(output[1:]) if isinstance(output, tuple) else None
            # A tensor of its own, by which the next block shows whether it was given what this one returned.
            self._returned = hidden.detach().clone()
            return self._returned if self._rest is None else (self._returned, *self._rest)

        return recorded

    def _continues(self, hidden: Tensor) -> bool:
        return self._returned is None or (
            hidden.data_ptr() == self._returned.data_ptr() and hidden.shape == self._returned.shape
        )


def _run_on(
    device: torch.device | None, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Run a block that is on another device than its arguments, and return its output where these are."""
    if device is None:
        return forward(*args, **kwargs)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return moved(forward(*moved(args, device), **moved(dict(kwargs), device)), tensors[0].device)


def _call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Call, Tensor] | None:
    """Return a call and its hidden states, or None if they cannot be identified."""
    args = tuple(_without_cache(value) for value in args)
    kwargs = {key: _without_cache(value) for key, value in kwargs.items()}
    if args and isinstance(args[0], Tensor):
        return Call(args[1:], kwargs, 0), args[0]
    if isinstance(hidden := kwargs.pop("hidden_states", None), Tensor):
        return Call(args, kwargs, "hidden_states"), hidden
    return None


def _without_cache(value: Any) -> Any:
    """Return None for a cache of keys and values: it would grow from call to call."""
    return None if hasattr(value, "get_seq_length") and hasattr(value, "update") else value


def _shared(call: Call, earlier: Call) -> Call:
    """Return a call whose arguments are the objects of an earlier one where they are equal: masks are large."""
    if len(call.args) != len(earlier.args):
        return call
    args = tuple(_either(own, other) for own, other in zip(call.args, earlier.args, strict=True))
    kwargs = {key: _either(own, earlier.kwargs.get(key)) for key, own in call.kwargs.items()}
    return Call(args, kwargs, call.place)


def _either(own: Any, other: Any) -> Any:
    if isinstance(own, Tensor) and isinstance(other, Tensor):
        same = own.shape == other.shape and own.dtype == other.dtype and torch.equal(own, other)
        return other if same else own
    if isinstance(own, tuple) and isinstance(other, tuple) and len(own) == len(other) and type(own) is tuple:
        return tuple(_either(a, b) for a, b in zip(own, other, strict=True))
    return own
