"""Activation checkpointing (arXiv 1604.06174): of each decoder layer only its input is kept, and the layer runs again
in backward.

Exact, bit for bit: what a layer computes does not depend on when it runs. Dropout is keyed by position, the backbone is
in evaluation mode, so no state of a random generator is put away.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


class ActivationCheckpointing:
    """Of the layers that transformers itself would checkpoint; there are none in some models. Off at first.

    `surrounding` makes what a layer needs around it while it runs again.
    """

    def __init__(self, model: nn.Module, surrounding: Callable[[], AbstractContextManager[None]]) -> None:
        self.is_on, self._surrounding = False, surrounding
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.num_layers = len(layers)
        for layer in layers:  # transformers' own switch wants the training mode, in which some layers drop
            layer.forward = partial(self._run, layer.forward)

    @contextmanager
    def switched(self, is_on: bool) -> Iterator[None]:
        """On or off for a while."""
        before, self.is_on = self.is_on, is_on
        try:
            yield
        finally:
            self.is_on = before

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not (self.is_on and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(
            partial(forward, **kwargs),
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), self._surrounding()),
        )
