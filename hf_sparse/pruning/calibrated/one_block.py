"""One block: its layers are observed while it runs on all batches, and pruned."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from ...modeling.layer_kinds import KeptTokens, MatrixLayer
from ..processes import have_same
from .stacks import StackObserver, Unreached, passes_over
from .statistics import InputObserver, UnsharedInputError
from .tasks import AnyTask, OnLayer, Tally, Task
from .walk import Step


def inside(step: Step, names: Mapping[str, object]) -> list[str]:
    """Return which layers are in a block, or are it."""
    return [name for name in names if name == step.name or name.startswith(f"{step.name}.")]


def observe(
    step: Step, layers: Mapping[str, MatrixLayer], with_products: Sequence[str], stacks: StackObserver
) -> InputObserver:
    """Run a block on all batches and return what its layers were given, on all processes together.

    Args:
        layers: with one weight, by name.
        with_products: names of those whose products of inputs are kept.
        stacks: observes stacked weights at the same time.
    """
    observer = InputObserver(layers, with_products)
    shared: dict[str, str] | None = None
    with contextlib.suppress(UnsharedInputError), observer:
        _run(step, observer, stacks)
        shared = observer.leaders
    if not have_same(shared) or shared is None:  # every process goes the same way
        observer = InputObserver(layers, with_products, share=False)
        stacks.reset()
        with observer:
            _run(step, observer, stacks)
    observer.sum_over_processes()
    stacks.sum_over_processes()
    return observer


def _run(step: Step, observer: InputObserver, stacks: StackObserver) -> None:
    def begin(kept: KeptTokens) -> None:
        observer.begin(kept)
        stacks.begin(kept)

    with stacks:
        step.run(begin)


def prune_block(step: Step, tasks: Mapping[str, AnyTask], on_layer: OnLayer | None, unreached: Unreached) -> None:
    """Observe the layers of one block that need it, and prune all.

    The block runs as often as the products of all experts need, and not at all where nothing needs inputs.

    Args:
        tasks: by name of the layer, or of the weight where a module has several.
        unreached: that experts without tokens are added to.
    """
    found = {name: tasks[name] for name in inside(step, tasks)}
    if not found:
        return
    stacks = {n: task for n, task in found.items() if isinstance(task, Task) and task.member.slot.parts is not None}
    plain = {name: task for name, task in found.items() if name not in stacks}
    # The layers beside stacks come before the experts, and are left as they are until all experts were observed.
    observer, tallies = _prune_stacks(step, plain, stacks, unreached)
    # Of all layers before any is pruned: what is wrong with one leaves the others as they are.
    inputs = {name: observer.of(name) if task.needs_inputs else None for name, task in plain.items()}
    for name, task in found.items():
        tally = tallies.get(name)
        update = task.apply(inputs[name]) if tally is None else tally.update(name, task.needs_products)
        if on_layer is not None:
            on_layer(update)


def _prune_stacks(
    step: Step, plain: Mapping[str, AnyTask], stacks: Mapping[str, Task], unreached: Unreached
) -> tuple[InputObserver, dict[str, Tally]]:
    """Prune the stacked weights of a block, observe its other layers, and return what was found of both."""
    masks = {name: task.mask_of_stack() for name, task in stacks.items()}
    tallies = {name: Tally() for name in stacks}
    observed = {name: task.member.slot for name, task in stacks.items() if task.needs_inputs}
    products = [name for name, task in stacks.items() if task.needs_products]
    first: InputObserver | None = None
    needed = {name: task.layer for name, task in plain.items() if task.needs_inputs}
    for parts in passes_over(observed, products) or ([{}] if needed else []):
        stacked = StackObserver(observed, products, parts)
        layers = needed if first is None else {}
        found = observe(step, layers, [name for name in layers if plain[name].needs_products], stacked)
        first = first or found
        unreached.add(stacked)
        for name, part in stacked.each():
            stacks[name].apply_part(part, masks[name], stacked.of(name, part), tallies[name])
    unreached.end_block()
    for name, task in stacks.items():
        for part in range(task.member.slot.parts or 0) if name not in observed else ():
            task.apply_part(part, masks[name], None, tallies[name])
    return first or InputObserver({}, ()), tallies
