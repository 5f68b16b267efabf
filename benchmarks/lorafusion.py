"""Runs LoRAFusion's Triton kernels (arXiv 2510.00206) as a peer, from a clone of its repository that the user provides.

`python benchmarks/bench_kernels.py --lorafusion FOLDER`, where FOLDER is a clone of github.com/CentML/lorafusion, with
triton, loguru and numpy installed. It imports megatron, but only for functions that are not used here, so an empty
module replaces it. Points that its kernels cannot run are refused with the reason: on these the kernels read out of
bounds or return wrong results.
"""

import importlib
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.kernels.multi_lora.types import AdapterSlice, LowRank

_MAX_TASKS, _TOKENS, _WIDTH = 4, 128, 256


class NotDoneError(Exception):
    """Raised with the reason why a peer cannot run a point."""


Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, list[Tensor]]]  # X, dY; Y, dX, gradients of A and B in turn


class LoraFusion:
    """LoRAFusion's multi-LoRA linear operator. Raises NotDoneError if its repository does not load."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "lorafusion" / "ops" / "multi_lora.py").is_file():
            raise NotDoneError(f"{folder} is not a clone of github.com/CentML/lorafusion: it has no lorafusion/ops")
        sys.path.insert(0, str(folder))
        try:
            importlib.import_module("megatron.core")
        except ImportError:
            _stand_in("megatron.core", parallel_state=None)
        try:
            config = importlib.import_module("lorafusion.ops.triton_ops.config")
            common = importlib.import_module("lorafusion.utils.common")
            self._tune_for_hopper(config, common.get_device_short_name())
            self._ops = importlib.import_module("lorafusion.ops.multi_lora")
        except ImportError as error:
            raise NotDoneError(f"LoRAFusion does not import: {error}") from error
        self._block = config.get_lora_kernel_config("fused_multi_lora_block_size_m")

    @staticmethod
    def _tune_for_hopper(config: Any, card: str) -> None:
        """Use LoRAFusion's settings of the H100 for a Hopper card without settings, such as an H200."""
        if card not in config.HARDWARE_CONFIGS and torch.cuda.get_device_capability() == (9, 0):
            config.HARDWARE_CONFIGS[card] = config.H100_CONFIG

    def operator(
        self, x_TK: Tensor, weight_KN: Tensor, uses: Sequence[AdapterSlice], factors: Sequence[LowRank]
    ) -> Run:
        """Return one linear operator, forward and backward, for streams like `x_TK`. Raises NotDoneError."""
        if why := refusal(x_TK, weight_KN, uses):
            raise NotDoneError(why)
        lengths, ranks = [use.end - use.start for use in uses], [len(low_rank.a_RK) for low_rank in factors]
        info = self._ops.prepare_multi_lora_batch_info(
            seq_len_list=lengths, lora_idx_list=list(range(len(ranks))), lora_rank_list=ranks,
            dropout_p_list=[0.0] * len(ranks), alpha_list=[use.scale for use in uses],
            block_size_m=self._block, output_dtype=x_TK.dtype, allow_empty_micro_batch_info=True,
        )  # fmt: skip
        weight_NK = weight_KN.T.contiguous()
        a, b = (
            [low_rank[i].detach().to(x_TK.dtype).requires_grad_() for low_rank in factors]  # type: ignore[union-attr]
            for i in range(2)
        )
        names = ("padded_seq_len_list", "block_to_lookup_table", "block_to_dropout_p", "block_to_alpha")
        options = {name: getattr(info, name) for name in (*names, "enable_dropout", "same_dropout_p_value", "max_r")}

        def run(x_TK: Tensor, dy_TN: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
            x = x_TK.detach().unsqueeze(0).requires_grad_()
            y = self._ops.fused_linear_multi_lora(
                x, weight_NK, lora_a_list=[*a], lora_b_list=[*b], seq_len_list=lengths, **options
            )
            leaves = [factor for pair in zip(a, b, strict=True) for factor in pair]
            dx, *gradients = torch.autograd.grad(y, [x, *leaves], dy_TN.unsqueeze(0))
            return y.detach()[0], dx[0], list(gradients)

        return run


def refusal(x_TK: Tensor, weight_KN: Tensor, uses: Sequence[AdapterSlice]) -> str | None:
    """Return the reason why its kernels cannot run a point, if any."""
    lengths = [use.end - use.start for use in uses]
    if len(uses) > _MAX_TASKS:
        return f"LoRAFusion takes {_MAX_TASKS} adapters at most, not {len(uses)}"
    if odd := [length for length in lengths if length % _TOKENS]:
        return f"LoRAFusion pads each adapter to {_TOKENS} tokens: {odd[0]} would not be the same work"
    if sum(lengths) != len(x_TK):
        return f"LoRAFusion gives every token an adapter: {sum(lengths)} of {len(x_TK)} have one"
    if odd := [width for width in weight_KN.shape if width % _WIDTH]:
        return f"LoRAFusion reads out of bounds at widths off {_WIDTH}: {odd[0]}"
    if x_TK.dtype not in (torch.bfloat16, torch.float16):
        return f"LoRAFusion takes bfloat16 and float16, not {x_TK.dtype}"
    return None


def _stand_in(name: str, **attributes: Any) -> None:
    """Create an empty module of this name with these attributes, and its parents."""
    parent = None
    for end in [i for i, letter in enumerate(name + ".") if letter == "."]:
        module = sys.modules.setdefault(name[:end], types.ModuleType(name[:end]))
        if parent is not None:
            setattr(parent, name[:end].rpartition(".")[2], module)
        parent = module
    for key, value in attributes.items():
        setattr(parent, key, value)
