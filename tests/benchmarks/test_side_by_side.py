"""All systems of side_by_side.py do the same training, so that their times can be compared."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, LlamaConfig

from benchmarks import goals, instances, models, report, side_by_side, trl_trainer, workload
from benchmarks.instances import SHARING, Setting
from benchmarks.models import Choice
from benchmarks.systems import Losses, System
from engine.alignment.packing import PackedTask, one_round
from engine.runtime.backbone import sharing_copy

HAS_TRL = all(importlib.util.find_spec(name) for name in ("trl", "greenlet"))
TINY = {
    "llama-2-7b": LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ),
    "gpt-2.7b": GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        use_parallel_residual=False,
    ),
}  # fmt: skip


def setting_of(name: str, mix: str, num_tasks: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(models, "SHAPES", TINY)
    choice = Choice(name, folder, "cpu")
    tasks = workload.make(mix, num_tasks, 2, 3, choice.vocabulary, choice.targets)
    return Setting(choice, tasks, 3, folder / "adapters", token_budget=256, chunk=16, threads=1)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("mix", ["mixed", "rte"])
def test_all_systems_report_the_same_losses_on_the_same_tokens(
    name: str, mix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = setting_of(name, mix, 5, tmp_path, monkeypatch)
    seconds, read, left_out = side_by_side.speeds(setting, SHARING[1:], setting.choice.load())  # exits if losses differ
    effective = [setting.workload.num_tokens(r) for r in (1, 2)]
    assert left_out == ({} if HAS_TRL else {trl_trainer.NAME: "its library is not installed"})
    assert set(seconds) == set(read) == set(SHARING) - set(left_out) and read["peft, flattened"] == effective
    assert read.get(trl_trainer.NAME, effective) == read["engine, alignment off (chunk 1)"] == effective
    for tokens in read.values():
        assert len(tokens) == 2 and all(n >= least for n, least in zip(tokens, effective, strict=True))
    assert sum(read["peft, cap"]) > sum(read["peft, longest"])


def test_a_system_that_trains_something_else_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = setting_of("llama-2-7b", "sst2", 2, tmp_path, monkeypatch)
    model = setting.choice.load()
    engine = setting.engine(sharing_copy(model))
    engine.export(setting.adapters)
    wrong = setting.one_after_another(model, "longest")
    for trainer in wrong.trainers:
        trainer.optimizer.param_groups[0]["lr"] *= 10
    with pytest.raises(SystemExit, match="round 1: losses of 'wrong' differ"):
        side_by_side.measure({"engine": engine, "wrong": wrong}, 2, 1e-4, {})


class Failing(System):
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def run(self, round_: int) -> Losses:
        if round_ and self.error:
            raise self.error
        return {"task": 1.0}


def test_a_peer_that_fails_is_left_out_of_what_follows() -> None:
    systems: dict[str, System] = {
        "engine": Failing(), "large": Failing(torch.OutOfMemoryError("no room")), "odd": Failing(KeyError("x")),
        "other": Failing(),
    }  # fmt: skip
    left_out = {"absent": "its library is not installed"}
    seconds = side_by_side.measure(systems, 5, 1e-4, left_out)
    assert set(seconds) == {"engine", "other"} == set(systems) and all(len(s) == 4 for s in seconds.values())
    reasons = {"large": "it ran out of memory", "odd": "it failed: KeyError", "absent": "its library is not installed"}
    assert left_out == reasons


@pytest.mark.parametrize("name", ["engine", "engine, fusion off"])
def test_the_engine_may_not_fail(name: str) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        side_by_side.measure({"engine": Failing(), name: Failing(torch.OutOfMemoryError("no room"))}, 2, 1e-4, {})


def test_a_peak_on_a_gpu_is_the_weights_and_what_grew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake of torch's counters replaces a GPU: leftovers of other systems do not count, tied weights count once."""
    setting = setting_of("llama-2-7b", "sst2", 2, tmp_path, monkeypatch)
    model = setting.choice.load()
    setting.engine(sharing_copy(model)).export(setting.adapters)
    counters = {"memory_allocated": 1000, "max_memory_allocated": 1500, "reset_peak_memory_stats": None}
    for name, value in counters.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    model.lm_head.weight = model.get_input_embeddings().weight
    weights = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    assert instances._peak_here(setting, "engine", model) == 4 * weights + 500


def test_no_work_is_started_that_would_likely_end_after_the_time() -> None:
    now = [100.0]
    clock = side_by_side.Clock(61.0, lambda: now[0])
    assert clock.has_time
    for seconds, has_time in ((20.0, True), (15.0, True), (10.0, False)):  # the longest takes 20 s
        now[0] += seconds
        clock.tick()
        assert clock.has_time is has_time
    assert side_by_side.Clock(math.inf, lambda: now[0]).has_time


def test_the_page_lists_what_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has skipped workloads, a system that was left out, the load, and the seconds to the end."""
    work = {
        "model": "small", "work": "rte, 2 tasks", "mix": "rte", "num_tasks": 2, "micro_batch_size": 8,
        "token_budget": 256, "chunk_tokens": 8, "seconds_by_round": {"engine": [1.25, 2.0, 3.0]},
        "tokens_read": {"engine": [10, 10, 10]}, "effective_tokens": [10, 10, 10], "flops": [1e9, 1e9, 1e9],
        "instances_are_of_one": False, "peak_bytes": {"engine": 3e6, "separate instances": 9e6},
        "peak_bytes_alone": [1e6, 2e6, 3e6], "left_out": {"batch and pad": "it ran out of memory"},
    }  # fmt: skip
    origin = {
        "benchmark": "side_by_side_cpu", "command": "c", "commit": "x", "when": "w", "machine": "m",
        "load_average": [0.0], "versions": {"torch": "2"},
    }  # fmt: skip
    page = side_by_side.section(origin | {"work": [work], "skipped": ["small: mixed, 32 tasks of 4 sequences"]})
    assert "(heavy load)" in page and "| 6.2 |" in page
    assert "Left out: batch and pad: it ran out of memory." in page
    assert "was up: small: mixed, 32 tasks of 4 sequences." in page


def test_a_workload_is_aligned_by_the_planners_chunk() -> None:
    """The chunk grows with the sequences, and padding is small, also if a micro batch needs several microbatches."""
    chunks = {}
    for mix in ("sst2", "rte"):
        tasks = workload.make(mix, 8, 8, 6, 64, [["q_proj"]])
        chunks[mix] = tasks.chunk_tokens(256)
        members = [PackedTask(w.name, w.dataset, w.spec.training, 6, 0) for w in tasks.tasks]
        packed = [m for r in range(6) for m in one_round(r, [(member, r) for member in members], 256, chunks[mix])]
        assert sum(m.num_tokens for m in packed) / sum(map(tasks.num_tokens, range(6))) - 1 < 0.03
    assert 1 <= chunks["sst2"] <= chunks["rte"]


def test_lengths_are_as_their_corpus_states() -> None:
    tasks = workload.make("mixed", 3, 500, 2, 64, [["q_proj"]]).tasks
    for work, corpus in zip(tasks, workload.CORPORA.values(), strict=True):
        lengths = sorted(map(len, work.rows))
        assert work.corpus == corpus and lengths[0] >= 4 and lengths[-1] <= corpus.cap
        assert abs(lengths[len(lengths) // 2] / corpus.median - 1) < 0.1


@pytest.mark.parametrize("name", TINY)
def test_flops_are_those_that_torch_counts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "SHAPES", TINY)
    choice = Choice(name, tmp_path, "cpu")
    model, length = choice.load(), 24
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        embedded = torch.randn(1, length, 32, requires_grad=True)
        model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    masked_half = 6.0 * 2 * 32 * length**2  # layers, width: torch counts the whole square
    assert counter.get_total_flops() == choice.flops([length]) + masked_half


def test_a_missed_goal_is_reported() -> None:
    work = {"peak_bytes": {"engine": 300, "separate instances": 900}, "peak_bytes_alone": [50, 150]}
    fast = {"engine": {"teraflops": 10.0}, "batch and pad": {"ratio": 2.5}}
    assert goals.faster_than("batch and pad", 2).verdict(work, fast).endswith("2.50 of 2: held")
    assert goals.faster_than("peft, cap", 2).verdict(work, fast).endswith("not measured")
    assert goals.bytes_of_one(1.5).verdict(work, fast).endswith("3.00 of at most 1.5: FAILED")
    assert goals.fewer_than_instances(5.3).verdict(work, fast).endswith("3.00 of 5.3: FAILED")
    assert goals.teraflops(500).verdict(work, fast).endswith("10.00 of 500: FAILED")


def test_work_on_the_page_stays_with_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier workload keeps its place, and is replaced if it is measured again."""
    works = [{"model": m, "mix": x, "num_tasks": n, "micro_batch_size": s} for m, x, n, s, _ in side_by_side.CPU_WORK]
    old = {"benchmark": "side_by_side_cpu", "commit": "old", "work": [*works[:3], works[5] | {"origin": "older"}]}
    (tmp_path / "side_by_side_cpu.json").write_text(json.dumps(old))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert side_by_side.on_page({"benchmark": "side_by_side_cuda"}) == []
    earlier_works = side_by_side.on_page({"benchmark": "side_by_side_cpu", "commit": "new"})
    page = side_by_side.in_order([works[4] | {"is": "new"}, works[1] | {"is": "new"}, *earlier_works])
    former = {"origin": {"benchmark": "side_by_side_cpu", "commit": "old"}}
    assert page == [
        former | works[0], works[1] | {"is": "new"}, former | works[2], works[4] | {"is": "new"},
        works[5] | {"origin": "older"},
    ]  # fmt: skip
