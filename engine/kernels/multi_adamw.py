"""AdamW steps (arXiv 1711.05101) of many tasks in one launch, each with its own rates, step count and clipping.

    g' = g * min(1, max_norm / (norm + 1e-6));  p -= lr * decay * p;  m += (1 - beta1) (g' - m)
    v = beta2 v + (1 - beta2) g'^2;  p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps);  g = 0

Steps as torch's AdamW does after clip_grad_norm_. A task with a gradient that is not finite is left unchanged. Reads
p, g, m and v once and writes them once: 32 bytes a parameter. On CUDA, cuda/multi_adamw.cu.
Legend: U tasks, P parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.kernels import cupy_launcher
from engine.kernels.constants import MULTI_ADAMW_BLOCKS
from engine.kernels.launch import POINTER, Kernel, Launcher, pack, struct_of

CHUNK = 1 << 14  # elements of one item
_CPU_ELEMENTS = 1 << 18  # elements that a CPU steps at once, which bounds their scratch memory
GROUP = struct_of(
    [(name, POINTER) for name in ("parameters", "gradients", "first_moments", "second_moments", "norm", "is_finite")]
    + [("num_elements", np.int64)]
    + [(name, np.float32) for name in ("max_norm", "decay", "beta1", "beta2", "one_minus_beta1", "one_minus_beta2")]
    + [(name, np.float32) for name in ("epsilon", "step_size", "root_correction")]
    + [("unused", np.int32)]
)
ITEM = struct_of([("group", np.int32), ("chunk", np.int32)])
LAUNCH = struct_of(
    [("groups", POINTER), ("items", POINTER), ("num_items", np.int32), ("chunk_elements", np.int32)],
)


@dataclass(frozen=True)
class AdamWGroup:
    """Parameters [P] of one task that share a learning rate, all float32.

    `step` counts from 1. `task`: the index of its norm.
    """

    task: int
    parameters_P: torch.Tensor
    gradients_P: torch.Tensor
    first_moments_P: torch.Tensor
    second_moments_P: torch.Tensor
    step: int
    learning_rate: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_norm: float = 0.0  # 0: no clipping

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.parameters_P, self.gradients_P, self.first_moments_P, self.second_moments_P


def multi_adamw(groups: Sequence[AdamWGroup], norms_U: torch.Tensor, is_finite_U: torch.Tensor) -> None:
    """Step each group in place. `norms_U` and `is_finite_U` are the results of `multi_grad_norm`.

    Memory is allocated before anything is written: if it runs out, no group has stepped. Raises ValueError if tensors
    differ in size or device, or are not contiguous float32.
    """
    for group in groups:
        for tensor in group.tensors:
            if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device != norms_U.device:
                raise ValueError(f"the tensors of a group must be contiguous float32 on {norms_U.device}")
            if tensor.numel() != group.parameters_P.numel():
                raise ValueError(f"a tensor has {tensor.numel()} elements for {group.parameters_P.numel()} parameters")
    if norms_U.is_cuda:
        launch_multi_adamw(cupy_launcher.launcher_of(norms_U.device), groups, norms_U, is_finite_U)
        return
    norms, flags = norms_U.tolist(), is_finite_U.tolist()
    scratch = torch.empty(_CPU_ELEMENTS)
    for group in groups:
        if flags[group.task]:
            for part in zip(*(torch.split(tensor, _CPU_ELEMENTS) for tensor in group.tensors), strict=True):
                _step(group, norms[group.task], part, scratch[: len(part[0])])


@torch.no_grad()
def _step(group: AdamWGroup, norm: float, part: Sequence[torch.Tensor], root_P: torch.Tensor) -> None:
    """Step a part of the group's tensors by torch: the reference. `root_P` is scratch memory."""
    p, g, m, v = part
    if group.max_norm > 0:
        g.mul_(min(1.0, group.max_norm / (norm + 1e-6)))
    p.mul_(1 - group.learning_rate * group.weight_decay)
    m.lerp_(g, 1 - group.beta1)
    v.mul_(group.beta2).addcmul_(g, g, value=1 - group.beta2)
    torch.sqrt(v, out=root_P).div_(math.sqrt(1 - group.beta2**group.step)).add_(group.epsilon)
    p.addcdiv_(m, root_P, value=-group.learning_rate / (1 - group.beta1**group.step))
    g.zero_()


def launch_multi_adamw(
    launcher: Launcher, groups: Sequence[AdamWGroup], norms_U: torch.Tensor, is_finite_U: torch.Tensor
) -> None:
    """Step each group by the kernel."""
    rows = np.zeros(len(groups), GROUP)
    for row, group in zip(rows, groups, strict=True):
        for name, tensor in zip(GROUP.names or (), group.tensors, strict=False):
            row[name] = tensor.data_ptr()
        row["norm"], row["is_finite"] = norms_U[group.task].data_ptr(), is_finite_U[group.task].data_ptr()
        row["num_elements"], row["max_norm"] = group.parameters_P.numel(), group.max_norm
        row["beta1"], row["one_minus_beta1"] = group.beta1, 1 - group.beta1
        row["beta2"], row["one_minus_beta2"] = group.beta2, 1 - group.beta2
        row["decay"], row["epsilon"] = 1 - group.learning_rate * group.weight_decay, group.epsilon
        row["step_size"] = group.learning_rate / (1 - group.beta1**group.step)
        row["root_correction"] = math.sqrt(1 - group.beta2**group.step)
    counts = -(-rows["num_elements"] // CHUNK)
    items = np.zeros(int(counts.sum()), ITEM)
    items["group"] = np.repeat(np.arange(len(groups)), counts)
    items["chunk"] = np.arange(len(items)) - (np.cumsum(counts) - counts)[items["group"]]
    if not len(items):
        return
    groups_table = launcher.upload(rows)  # different in each step
    items_table = launcher.get_or_create(("adamw", items.tobytes()), lambda: launcher.upload(items))
    struct = pack(LAUNCH, groups=groups_table, items=items_table, num_items=len(items), chunk_elements=CHUNK)
    num_blocks = min(len(items), MULTI_ADAMW_BLOCKS * launcher.num_multiprocessors)
    pointed = [norms_U, is_finite_U, *(tensor for group in groups for tensor in group.tensors)]
    launcher.launch(
        Kernel("multi_adamw.cu", "multi_adamw"), num_blocks, 0, struct, [groups_table, items_table], pointed
    )
