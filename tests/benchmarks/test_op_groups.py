"""Each operator of a profiled step counts in the part that called it, and the parts add up to the whole time."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from benchmarks import models, op_groups, profile_step, workload
from benchmarks.instances import Setting, build
from benchmarks.models import Choice
from benchmarks.op_groups import ADAPTERS, ATTENTION, COPIES, ELEMENTWISE, FROZEN, GROUPS, IDLE, LOSS, OPTIMIZER, OTHER
from engine.runtime.backbone import sharing_copy

LAYERS, TASKS = 2, 3
TINY = LlamaConfig(
    vocab_size=61, hidden_size=40, intermediate_size=52, num_hidden_layers=LAYERS, num_attention_heads=4,
)  # fmt: skip


def setting_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(models, "SHAPES", {"llama-2-7b": TINY})
    choice = Choice("llama-2-7b", folder, "cpu")
    tasks = workload.make("sst2", TASKS, 2, 6, choice.vocabulary, choice.targets)
    return Setting(choice, tasks, 6, folder / "adapters", token_budget=4096, chunk=1, threads=1)


@pytest.mark.parametrize("name", ["engine", "peft, longest", "batch and pad"])
def test_every_product_is_where_it_belongs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares the products of a round of all tasks with numbers worked out by hand."""
    setting = setting_of(tmp_path, monkeypatch)
    model = setting.choice.load()
    frozen = op_groups.frozen_shapes(model)
    setting.engine(sharing_copy(model)).export(setting.adapters)  # type: ignore[attr-defined]
    system = build(setting, name, model)
    system.run(0)
    with (
        op_groups.in_ranges(profile_step._models(system)),
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler,
    ):
        system.run(1)
    events = profiler.events()
    forward = op_groups._groups_of_nodes(events)
    counts = Counter(
        op_groups._group_of(event, forward, frozen)
        for event in events
        if event.name in op_groups._PRODUCTS - {"aten::linear"} | {op_groups._BY_PACKED}  # linear calls another
    )
    streams = TASKS if name == "peft, longest" else 1
    per_layer = 7
    assert counts[FROZEN] == streams * (2 * (LAYERS * per_layer + 1) - 3)  # the first q, k and v pass nothing back
    adapters = LAYERS * (2 + 2 + 4)  # q and v of two tasks; q, k, v and o of the third
    assert counts[ADAPTERS] >= 6 * adapters - 3 * (1 + 2) and set(counts) == {FROZEN, ADAPTERS}
    seconds = op_groups.seconds_by_group(events, 10.0, frozen, is_device=False)
    assert sum(seconds.values()) == pytest.approx(10.0) and tuple(seconds) == GROUPS
    assert all(seconds[group] > 0 for group in (ADAPTERS, ATTENTION, ELEMENTWISE, LOSS, OPTIMIZER, COPIES, IDLE))


class Events:
    """A profile made by hand: each event takes 1 s of self time, on the host and on the device."""

    def __init__(self) -> None:
        self.all: list[Any] = []

    def add(
        self, name: str, parent: Any = None, sequence: int = -1, shapes: Any = (), kind: Any = DeviceType.CPU
    ) -> Any:
        self.all.append(
            SimpleNamespace(
                name=name, cpu_parent=parent, sequence_nr=sequence, input_shapes=shapes, device_type=kind,
                time_range=SimpleNamespace(start=len(self.all)), self_cpu_time_total=1e6, self_device_time_total=2e6,
            )
        )  # fmt: skip
        return self.all[-1]


def test_backward_belongs_to_the_part_that_made_its_node() -> None:
    events = Events()
    model = events.add(f"{op_groups._PREFIX}{ELEMENTWISE}")
    events.add("aten::view", model, 7)  # makes no node: the next has the same number
    attention = events.add(f"{op_groups._PREFIX}{ATTENTION}", model)
    events.add("aten::softmax", attention, 7)
    events.add("aten::mul", model, 8)
    events.add("aten::mm", attention, 9, ([5, 4], [4, 6]))
    node = {n: events.add(f"{op_groups._BACKWARD}Backward{n}", None, n) for n in (9, 8, 7, 6)}
    events.add("aten::mm", node[9], -1, ([5, 6], [6, 4]))
    events.add("aten::mm", node[9], -1, ([4, 5], [5, 6]))
    events.add("aten::mul", node[8])
    events.add("aten::softmax_backward", node[7])
    events.add("aten::anything", node[6])
    events.add("aten::copy_", node[7])
    gather = events.add(f"{op_groups._BACKWARD}torch::autograd::AccumulateGrad", None, -1)
    events.add("aten::add_", gather)
    events.add("aten::zero_")
    events.add("a kernel", kind=DeviceType.CUDA)
    frozen = {(4, 6), (6, 4)}
    host = op_groups.seconds_by_group(events.all, 100.0, frozen, is_device=False)
    assert host == {
        FROZEN: 2.0, ADAPTERS: 1.0, ATTENTION: 3.0, ELEMENTWISE: 3.0, LOSS: 0.0, OPTIMIZER: 0.0, COPIES: 1.0,
        OTHER: 2.0, IDLE: 88.0,
    }  # fmt: skip
    device = op_groups.seconds_by_group(events.all, 100.0, frozen, is_device=True)
    assert device[FROZEN] == 4.0 and sum(device.values()) == 100.0


def test_a_profile_is_reported_with_its_shares() -> None:
    seconds = dict.fromkeys(GROUPS, 0.0) | {FROZEN: 3.0, IDLE: 1.0}
    engine_profile = {"seconds": seconds, "whole_seconds": 4.0, "plain_seconds": 1.0, "tokens": 100, "plain_tokens": 50,
                      "frozen_flops": 6e12}  # fmt: skip
    text = profile_step.table({"engine": engine_profile}, 8e12)
    assert "| frozen GEMMs | 3.00 s, 75.0% |" in text and "| all of it | 4.00 s |" in text
    assert "| a token takes, of one without the profiler | 2.00 |" in text
    assert "| frozen GEMMs: TFLOP/s, of a plain product | 2, 25% |" in text
