"""Tests that the shim that runs kernels on this CPU finds planted faults."""

import numpy as np
import pytest
import torch

from engine.kernels.constants import THREADS
from engine.kernels.launch import POINTER, Kernel, pack, struct_of
from tests.engine.kernels.conftest import MakeHost
from tests.engine.kernels.host.launcher import HostError, HostLauncher

SOURCE = "../tests/engine/kernels/host/planted.cu"
LAUNCH = struct_of([("in", POINTER), ("out", POINTER), ("size", np.int32), ("unused", np.int32)])


def run(launcher: HostLauncher, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, outputs = torch.randn(THREADS), torch.full((THREADS,), float("nan"))
    struct = pack(LAUNCH, **{"in": inputs, "out": outputs, "size": THREADS, "unused": 0})
    launcher.launch(Kernel(SOURCE, f"planted_{name}"), 1, 4 * THREADS, struct, [], [inputs, outputs])
    return inputs, outputs


@pytest.mark.parametrize("seed", [0, 1])
def test_sound_kernels_pass(host_launcher: MakeHost, seed: int) -> None:
    inputs, outputs = run(host_launcher(seed), "sound")
    assert torch.equal(outputs, inputs.roll(-1))
    inputs, outputs = run(host_launcher(seed), "copy")
    assert torch.equal(outputs, inputs)


FAULTS = {
    "barrier_not_for_all": "deadlock",
    "disagreement": "different collective",
    "read_beyond": "heap-buffer-overflow",
    "write_beyond": "heap-buffer-overflow",
    "shared_beyond": "heap-buffer-overflow",
    "unaligned": "misaligned address",
    "copy_unaligned": "not aligned",
}


@pytest.mark.parametrize(("name", "words"), FAULTS.items(), ids=FAULTS)
def test_faults_abort_and_say_why(host_launcher: MakeHost, name: str, words: str) -> None:
    with pytest.raises(HostError, match=words):
        run(host_launcher(0), name)


def test_a_missing_barrier_shows_as_a_wrong_result(host_launcher: MakeHost) -> None:
    inputs, outputs = run(host_launcher(1), "missing_barrier")
    assert not torch.equal(outputs, inputs.roll(-1))


def test_a_copy_read_before_it_is_waited_for_is_poison(host_launcher: MakeHost) -> None:
    _, outputs = run(host_launcher(0), "missing_wait")
    assert outputs.isnan().all()
