"""LoRAFusion's Triton kernels (arXiv 2510.00206) beside ours: its repository is the user's own checkout, never ours.

`python benchmarks/bench_kernels.py --lorafusion FOLDER`, where FOLDER is a clone of github.com/CentML/lorafusion, with
triton, loguru and numpy installed. Of megatron it needs a name only, for what is not used here. What its kernels
cannot do is refused with the reason, not run: they read beyond their rows or answer wrongly there.
"""

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_multi_lora import Inputs, NotDoneError, Result
from engine.kernels.multi_lora import Operator

OfOperator = tuple[Tensor, Tensor, list[Tensor]]  # Y, dX, gradients of A and B in turn
_MAX_TASKS, _TOKENS, _WIDTH = 4, 128, 256


class LoraFusion:
    """Its multi-LoRA linear operator. Raises NotDoneError where its repository does not load."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "lorafusion" / "ops" / "multi_lora.py").is_file():
            raise NotDoneError(f"{folder} is no clone of github.com/CentML/lorafusion: it has no lorafusion/ops")
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
        """A Hopper card that it has no settings for, as an H200, gets those of its H100."""
        if card not in config.HARDWARE_CONFIGS and torch.cuda.get_device_capability() == (9, 0):
            config.HARDWARE_CONFIGS[card] = config.H100_CONFIG

    def __call__(self, given: Inputs) -> Callable[[Inputs], Result]:
        """A contender for these inputs. Raises NotDoneError."""
        if why := refusal(given):
            raise NotDoneError(why)
        made = [self._operator(operator, given.x.dtype) for operator in given.operators]

        def run(own: Inputs) -> Result:
            parts = [one(own.x, dy) for one, dy in zip(made, own.dys, strict=True)]
            dx = parts[0][1].clone()
            for _, part, _ in parts[1:]:
                dx += part
            return [y for y, _, _ in parts], dx, [gradient for _, _, own in parts for gradient in own]

        return run

    def _operator(self, operator: Operator, dtype: torch.dtype) -> Callable[[Tensor, Tensor], OfOperator]:
        """From X and dY to Y, dX and the gradients of A and B in turn."""
        lengths = [use.end - use.start for use in operator.uses]
        ranks = [len(low_rank.a_RK) for low_rank in operator.factors]
        info = self._ops.prepare_multi_lora_batch_info(
            seq_len_list=lengths, lora_idx_list=list(range(len(ranks))), lora_rank_list=ranks,
            dropout_p_list=[0.0] * len(ranks), alpha_list=[use.scale for use in operator.uses],
            block_size_m=self._block, output_dtype=dtype, allow_empty_micro_batch_info=True,
        )  # fmt: skip
        weight_NK = operator.weight_KN.T.contiguous()
        leaves = [
            tuple(factor.detach().to(dtype).requires_grad_() for factor in (low_rank.a_RK, low_rank.b_NR))
            for low_rank in operator.factors
        ]
        names = ("padded_seq_len_list", "block_to_lookup_table", "block_to_dropout_p", "block_to_alpha")
        options = {name: getattr(info, name) for name in (*names, "enable_dropout", "same_dropout_p_value", "max_r")}

        def run(x_TK: Tensor, dy_TN: Tensor) -> OfOperator:
            x = x_TK.detach().unsqueeze(0).requires_grad_()
            y = self._ops.fused_linear_multi_lora(
                x, weight_NK, lora_a_list=[a for a, _ in leaves], lora_b_list=[b for _, b in leaves],
                seq_len_list=lengths, **options,
            )  # fmt: skip
            flat = [factor for pair in leaves for factor in pair]
            dx, *gradients = torch.autograd.grad(y, [x, *flat], dy_TN.unsqueeze(0))
            return y.detach()[0], dx[0], list(gradients)

        return run


def refusal(given: Inputs) -> str | None:
    """What of these inputs its kernels cannot do, if anything."""
    uses, widths = given.operators[0].uses, [n for operator in given.operators for n in operator.weight_KN.shape]
    if len(uses) > _MAX_TASKS:
        return f"LoRAFusion takes {_MAX_TASKS} adapters at most, not {len(uses)}"
    if odd := [use for use in uses if (use.end - use.start) % _TOKENS]:
        return (
            f"LoRAFusion pads each adapter to {_TOKENS} tokens: {odd[0].end - odd[0].start} would not be the same work"
        )
    if odd_widths := [width for width in widths if width % _WIDTH]:
        return f"LoRAFusion reads out of bounds at widths off {_WIDTH}: {odd_widths[0]}"
    if given.x.dtype not in (torch.bfloat16, torch.float16):
        return f"LoRAFusion takes bfloat16 and float16, not {given.x.dtype}"
    return None


def _stand_in(name: str, **attributes: Any) -> None:
    """A module of this name, and its parents, that hold nothing else."""
    parent = None
    for end in [i for i, letter in enumerate(name + ".") if letter == "."]:
        module = sys.modules.setdefault(name[:end], types.ModuleType(name[:end]))
        if parent is not None:
            setattr(parent, name[:end].rpartition(".")[2], module)
        parent = module
    for key, value in attributes.items():
        setattr(parent, key, value)
