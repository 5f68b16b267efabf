"""Tests kernels on two streams at once: neither reads a table before its copy, nor uses the other's counters."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

from engine.kernels import multi_affine_device
from engine.kernels.grouped_gemm_device import MatrixProduct, launch_products
from engine.kernels.launch import CachingUploader, DeviceTable, Kernel
from engine.kernels.multi_adamw import AdamWGroup, launch_multi_adamw
from engine.kernels.multi_grad_norm import launch_multi_grad_norm
from tests.engine.kernels.conftest import MakeHost
from tests.engine.kernels.host.launcher import HostLauncher
from tests.engine.kernels.multi_lora.test_device_products import Problem, Shape

Run = Callable[[Any, int], list[torch.Tensor]]


class QueuedStreams(CachingUploader):
    """A launcher whose streams are queues: copies and launches of one stream run in order, when the test says so.

    Those of two streams run in any order, as on a GPU. Until its copy has run, a table holds other bytes.
    """

    num_multiprocessors = 1

    def __init__(self, host: HostLauncher) -> None:
        super().__init__(host.device)
        self.current, self._host = 1, host
        self.memory: dict[int, dict[int, torch.UntypedStorage]] = defaultdict(dict)  # storages by address, by stream
        self._queues: dict[int, list[Callable[[], object]]] = defaultdict(list)

    @property
    def stream(self) -> int:
        return self.current

    def upload(self, rows: NDArray[Any]) -> DeviceTable:
        table = super().upload(rows)
        content = table.tensor_B.clone()
        table.tensor_B.fill_(0xA5)
        self._queues[self.current].append(lambda: table.tensor_B.copy_(content))
        return table

    def launch(
        self,
        kernel: Kernel,
        num_blocks: int,
        shared_bytes: int,
        struct: NDArray[Any],
        tables: Sequence[DeviceTable],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        storages = [tensor.untyped_storage() for tensor in (*(table.tensor_B for table in tables), *tensors)]
        self.memory[self.current] |= {storage.data_ptr(): storage for storage in storages if storage.nbytes()}
        self._queues[self.current].append(
            lambda: self._host.launch(kernel, num_blocks, shared_bytes, struct, tables, tensors)
        )

    def run(self, stream: int) -> None:
        """Run all that the stream has been given."""
        queue = self._queues.pop(stream, [])
        for action in queue:
            action()


def draw(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def grouped_gemm(launcher: Any, seed: int) -> list[torch.Tensor]:
    """Two products with a split depth, one without."""
    shapes = [(70, 2100, 20), (5, 3, 9), (3, 1500, 70)]
    products = [
        MatrixProduct(draw(seed + i, m, d), draw(seed + 9 + i, d, n), torch.empty(m, n), 1.5)
        for i, (m, d, n) in enumerate(shapes)
    ]
    launch_products(launcher, products)
    return [product.c_MN for product in products]


def affine(launcher: Any, seed: int) -> list[torch.Tensor]:
    """One use whose sums are split over its tokens, one that is not."""
    vectors = [draw(seed + i, 200) for i in range(4)]
    rows = multi_affine_device.AffineRows([0, 700, 700, 720], [3, 3], vectors, [True] * 4)
    x_TN, dy_TN = draw(seed + 5, 730, 200), draw(seed + 6, 730, 200)
    y_TN, dx_TN, gradients = torch.empty(730, 200), torch.empty(730, 200), torch.empty(4 * 200)
    multi_affine_device.forward(launcher, rows, x_TN, y_TN)
    multi_affine_device.backward(launcher, rows, x_TN[:720].contiguous(), dy_TN, dx_TN, gradients)
    return [y_TN, dx_TN, gradients]


def multi_lora(launcher: Any, seed: int) -> list[torch.Tensor]:
    """Sums over many tokens and wide operators are split."""
    shapes = [Shape(700, (16, 8), seed=seed), Shape(80, (4, 40), seed=seed + 1)]
    problem = Problem(shapes, 300, (700, 200), torch.float32)
    results = problem.run(launcher)
    gradients = [view for views in results.gradients for view in views if view is not None]
    return [*results.ys, results.dx, *gradients]


def optimizer(launcher: Any, seed: int) -> list[torch.Tensor]:
    """Norms over several work items, then a step."""
    sizes = [70_000, 9]
    groups = [
        AdamWGroup(
            task=i, parameters_P=draw(seed + i, size), gradients_P=draw(seed + 3 + i, size),
            first_moments_P=torch.zeros(size), second_moments_P=torch.zeros(size), step=1, learning_rate=0.1,
            weight_decay=0.1, beta1=0.9, beta2=0.99, epsilon=1e-8, max_norm=1.0,
        )
        for i, size in enumerate(sizes)
    ]  # fmt: skip
    norms_U, is_finite_U = launch_multi_grad_norm(launcher, [group.gradients_P for group in groups])
    launch_multi_adamw(launcher, groups, norms_U, is_finite_U)
    return [norms_U, *(tensor for group in groups for tensor in group.tensors)]


@pytest.mark.parametrize("run", [grouped_gemm, affine, multi_lora, optimizer], ids=lambda run: run.__name__)
def test_two_streams_share_neither_tables_nor_counters(host_launcher: MakeHost, run: Run) -> None:
    """Both run the same shapes, so that one could use what was cached for the other."""
    expected = [[tensor.clone() for tensor in run(host_launcher(0), seed)] for seed in (100, 200)]
    streams = QueuedStreams(host_launcher(0))
    results = []
    for streams.current, seed in ((1, 100), (2, 200)):  # type: ignore[misc]
        results.append(run(streams, seed))
    shared = streams.memory[1].keys() & streams.memory[2].keys()
    assert not shared, f"{sum(streams.memory[1][address].nbytes() for address in shared)} bytes"
    streams.run(2)
    streams.run(1)
    for ours, theirs in zip(results, expected, strict=True):
        assert len(ours) == len(theirs) > 0
        for tensor, reference in zip(ours, theirs, strict=True):
            assert torch.equal(tensor, reference)


def test_a_stream_uses_its_cached_tables_again(host_launcher: MakeHost) -> None:
    streams = QueuedStreams(host_launcher(0))
    made: list[int] = []
    for streams.current in (1, 2, 1, 2):  # type: ignore[misc]
        streams.get_or_create("table", lambda: made.append(streams.current))
        cache = streams.subcache("plans", 1)
        cache.get_or_create("plan", lambda: made.append(10 * streams.current))
    assert made == [1, 10, 2, 20]
