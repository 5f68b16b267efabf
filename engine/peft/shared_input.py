"""Linear operators that read the very same tensor (q, k and v; gate and up), computed together.

Which ones do is seen by the probe at load; at run time it is a guess. The first of a group to be called computes all of
them in one node of autograd, and the others take their Y if they are called with the same tensor, unchanged; else they
compute alone. Nothing is kept beyond the forward pass.
Legend: T tokens of the packed stream, K inputs, N outputs.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from engine.kernels.multi_lora.dispatch import multi_lora
from engine.kernels.multi_lora.types import MAX_OPERATORS, Operator


class SharedInputOperator(Protocol):
    """A mounted linear operator."""

    @property
    def rewrites_input(self) -> bool:
        """Whether a task of this microbatch has it read something else than x."""

    def operator(self) -> Operator:
        """What it computes of this microbatch."""


class SharedInput:
    """A group, and what is computed and not yet taken of it."""

    def __init__(self, members: Sequence[SharedInputOperator]) -> None:
        self._members = tuple(members)
        self._is_open = False
        self._given: tuple[Any, ...] | None = None
        self._answers: dict[SharedInputOperator, torch.Tensor] = {}

    def answer(self, member: SharedInputOperator, x: torch.Tensor) -> torch.Tensor | None:
        """Y [T, N] of one member, or None if it has to compute alone."""
        if not self._is_open or x.is_inference():  # such a tensor does not tell whether it has been written to
            return None
        given = (x, x._version, torch.is_grad_enabled())
        if self._given is None or given[0] is not self._given[0] or given[1:] != self._given[1:]:
            self._compute(member, given)
        y_TN = self._answers.pop(member, None)
        if not self._answers:
            self._given = None
        return y_TN

    def _compute(self, caller: SharedInputOperator, given: tuple[Any, ...]) -> None:
        """Of all members whose Y is differentiable: what needs no gradient must not keep anything for one."""
        self._forget()
        x = given[0]
        if any(member.rewrites_input for member in self._members):
            return
        operators = {member: member.operator() for member in self._members}
        if not x.requires_grad:
            operators = {member: operator for member, operator in operators.items() if operator.uses}
        if caller in operators and len(operators) > 1:
            results = multi_lora(x.reshape(-1, x.shape[-1]), list(operators.values()))
            self._given, self._answers = given, dict(zip(operators, results, strict=True))

    def _forget(self) -> None:
        self._given, self._answers = None, {}

    def open(self) -> None:
        self._is_open = True

    def close(self) -> None:
        self._is_open = False
        self._forget()


@contextmanager
def sharing(groups: Iterable[SharedInput]) -> Iterator[None]:
    """One forward pass of the backbone: outside of it every operator computes alone."""
    for group in groups:
        group.open()
    try:
        yield
    finally:
        for group in groups:
            group.close()


@contextmanager
def observed_inputs(operators: Mapping[str, nn.Module]) -> Iterator[list[list[str]]]:
    """Names of the operators that are called one after another with the very same tensor, in a forward pass run in this
    context, in the order of their calls. Filled when the context ends. One that is called twice is in no group.
    """
    calls: list[tuple[str, torch.Tensor, int]] = []  # the tensors are held: an address is not used twice
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
        found = [name for name, *_ in same if names.count(name) == 1]
        groups += [found[i : i + MAX_OPERATORS] for i in range(0, len(found), MAX_OPERATORS)]
    groups[:] = [group for group in groups if len(group) > 1]
