"""Linear operators that read the very same tensor (q, k and v; gate and up), computed together.

The probe at load finds the groups; at run time a group is only a guess. The first member that is called computes all
members in one node of autograd. Each other member returns its Y from there if it is called with the same tensor,
unchanged; else it computes alone. Nothing is kept after the forward pass.
Legend: T tokens of the packed stream, K inputs, N outputs.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from engine.kernels.constants import MAX_OPERATORS
from engine.kernels.multi_lora.dispatch import multi_lora
from engine.kernels.multi_lora.types import Operator


class SharedInputOperator(Protocol):
    """A mounted linear operator."""

    @property
    def rewrites_input(self) -> bool:
        """Return whether an adapter of this microbatch changes the operator's input."""

    def operator(self) -> Operator:
        """Return the arguments of multi_lora for this microbatch."""


class SharedInput:
    """A group of operators, with the outputs that are computed and not yet returned."""

    def __init__(self, members: Sequence[SharedInputOperator]) -> None:
        self._members = tuple(members)
        self._is_open = False
        self._input_key: tuple[Any, ...] | None = None
        self._outputs: dict[SharedInputOperator, torch.Tensor] = {}

    def output_of(self, member: SharedInputOperator, x: torch.Tensor) -> torch.Tensor | None:
        """Return Y [T, N] of one member, or None if it has to compute alone."""
        if not self._is_open or x.is_inference():  # an inference tensor has no version that shows a write
            return None
        key = (x, x._version, torch.is_grad_enabled())
        if self._input_key is None or key[0] is not self._input_key[0] or key[1:] != self._input_key[1:]:
            self._compute(member, key)
        y_TN = self._outputs.pop(member, None)
        if not self._outputs:
            self._input_key = None
        return y_TN

    def _compute(self, caller: SharedInputOperator, key: tuple[Any, ...]) -> None:
        """Compute all members; without those that need no gradient, which would save tensors for one."""
        self._forget()
        x = key[0]
        if any(member.rewrites_input for member in self._members):
            return
        operators = {member: member.operator() for member in self._members}
        if not x.requires_grad:
            operators = {member: operator for member, operator in operators.items() if operator.uses}
        if caller in operators and len(operators) > 1:
            results = multi_lora(x.reshape(-1, x.shape[-1]), list(operators.values()))
            self._input_key, self._outputs = key, dict(zip(operators, results, strict=True))

    def _forget(self) -> None:
        self._input_key, self._outputs = None, {}

    def open(self) -> None:
        self._is_open = True

    def close(self) -> None:
        self._is_open = False
        self._forget()


@contextmanager
def sharing(groups: Iterable[SharedInput]) -> Iterator[None]:
    """Let groups compute together in this context, one forward pass; outside of it every operator computes alone."""
    for group in groups:
        group.open()
    try:
        yield
    finally:
        for group in groups:
            group.close()


@contextmanager
def observed_inputs(operators: Mapping[str, nn.Module]) -> Iterator[list[list[str]]]:
    """Record groups of operators that a forward pass in this context calls one after another with the same tensor.

    Yields their names in the order of calls, filled when the context ends. An operator called twice is in no group.
    """
    calls: list[tuple[str, torch.Tensor, int]] = []  # holding the tensors keeps ids unique
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args[0], args[0]._version)))
        for name, module in operators.items()
    ]
    groups: list[list[str]] = []
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()
    names = [name for name, *_ in calls]
    for _, same in itertools.groupby(calls, key=lambda call: (id(call[1]), call[2])):
        group = [name for name, *_ in same if names.count(name) == 1]
        groups += [group[i : i + MAX_OPERATORS] for i in range(0, len(group), MAX_OPERATORS)]
    groups[:] = [group for group in groups if len(group) > 1]
