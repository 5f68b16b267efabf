"""Activation checkpointing (arXiv 1604.06174): a decoder layer saves only its input, and runs again in backward.

The results are the same bit for bit: a layer's result does not depend on when it runs. No state of a random generator
is saved, because dropout is keyed by position and the backbone is in evaluation mode.
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
    """Checkpoints the layers that transformers would checkpoint; some models have none. Off at first.

    `surrounding` returns the context in which a layer runs again.
    """

    def __init__(self, model: nn.Module, surrounding: Callable[[], AbstractContextManager[None]]) -> None:
        self.is_on, self._surrounding = False, surrounding
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.num_layers = len(layers)
        for layer in layers:  # transformers' switch needs the training mode, in which some layers drop out
            layer.forward = partial(self._run, layer.forward)

    @contextmanager
    def switched(self, is_on: bool) -> Iterator[None]:
        """Switches checkpointing on or off within the context."""
        was_on, self.is_on = self.is_on, is_on
        try:
            yield
        finally:
            self.is_on = was_on

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
