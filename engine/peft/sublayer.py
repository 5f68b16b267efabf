"""Whole sublayers of the backbone, attention or feed-forward network, that adapters can be mounted on.

Legend: T tokens of the packed stream, K width of the hidden states that a sublayer reads, N of those it returns.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from engine.methods.base import Site, SiteKind
from engine.peft.adapter import Adapter, BaseOp
from engine.peft.dispatch import rewrite_output
from engine.peft.layout import Layout


class MountedSublayer:
    """Rewrites a sublayer's output on the spans of tasks that have an adapter around it."""

    def __init__(self, base: nn.Module, name: str, index: int, widths: tuple[int, int], layout: Layout) -> None:
        weight: Any = next(base.parameters())
        self.op = BaseOp(Site(name, *widths, SiteKind.BLOCK), index, base, weight.detach())
        self.layout = layout
        self.adapters: dict[str, Adapter] = {}
        base.register_forward_hook(self._rewrite, with_kwargs=True)

    def _rewrite(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        uses = self.layout.uses(self.adapters)
        if not uses:
            return None
        x_TK, y_TN = _input_of(args, kwargs)[0], _hidden_of(output)[0]
        y_1TN = rewrite_output(y_TN, x_TK, uses, self.layout.training).unsqueeze(0)
        return (y_1TN, *output[1:]) if isinstance(output, tuple) else y_1TN


@contextmanager
def observed_sublayers(model: nn.Module, operators: Iterable[str]) -> Iterator[dict[str, tuple[int, int]]]:
    """Record (K, N) of the sublayers that run in this context, by name.

    A sublayer is an innermost module that holds operators, reads hidden states [1, T, K] and returns [1, T, N].
    """
    holders = {name.rpartition(".")[0] for name in operators} - {""}
    inner = [name for name in holders if not any(other.startswith(f"{name}.") for other in holders)]
    widths: dict[str, tuple[int, int]] = {}
    hooks = []
    for name in (name for name, _ in model.named_modules() if name in inner):

        def record(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any, name: str = name) -> None:
            x, y = _input_of(args, kwargs), _hidden_of(output)
            if _is_stream(x) and _is_stream(y) and x.shape[:2] == y.shape[:2]:
                widths[name] = (x.shape[2], y.shape[2])

        hooks.append(model.get_submodule(name).register_forward_hook(record, with_kwargs=True))
    try:
        yield widths
    finally:
        for hook in hooks:
            hook.remove()


def _input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def _hidden_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _is_stream(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 3 and value.shape[0] == 1


def mount_sublayers(
    model: nn.Module, layout: Layout, widths: Mapping[str, tuple[int, int]]
) -> dict[str, MountedSublayer]:
    """Mount the sublayers that were observed, in the backbone's order."""
    names = [name for name, _ in model.named_modules() if name in widths]
    return {
        name: MountedSublayer(model.get_submodule(name), name, index, widths[name], layout)
        for index, name in enumerate(names)
    }
