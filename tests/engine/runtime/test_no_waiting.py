"""Between a microbatch and its losses nothing waits for the device: an operator that would is detected on a CPU."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.runtime.test_on_kernels import METHODS
from tests.engine.runtime.tiny import CONFIGS, executor_with, model_of, pack_round, task_of

_READS_BACK = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::equal"}


class ReadsBack(TorchDispatchMode):
    """Records operators with a result, or a shape of it, that the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        is_masked = name.startswith("aten::index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if name in _READS_BACK or is_masked:
            self.waiting.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_forward_and_backward_do_not_wait_for_the_device(architecture: str) -> None:
    tasks = [task_of("a"), task_of("b", dropout=0.2, seed=1)]
    check(architecture, tasks)


def test_tasks_of_every_method_do_not_wait_for_the_device() -> None:
    check("llama-tied", [task_of(name, method=METHODS[name], seed=i) for i, name in enumerate(METHODS)])


def check(architecture: str, tasks: Any) -> None:
    executor = executor_with(model_of(CONFIGS[architecture]), tasks)
    microbatch = pack_round(tasks, [0] * len(tasks))[0]
    with ReadsBack() as mode:
        hidden_TH = executor.backbone.hidden(microbatch, frozenset(executor.tasks))
        hidden_TH.backward(torch.ones_like(hidden_TH))
    assert mode.waiting == []
    assert all(run.gradient_P.abs().sum() > 0 for run in executor.tasks.values())
