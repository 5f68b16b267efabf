"""All systems of the side-by-side train the same: else their times say nothing."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, LlamaConfig

from benchmarks import goals, models, side_by_side, workload
from benchmarks.instances import SHARING, Setting
from benchmarks.models import Choice
from engine.runtime.backbone import sharing_copy

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
    seconds, read = side_by_side.speeds(setting, SHARING[1:])  # exits where losses differ
    effective = [setting.workload.num_tokens(r) for r in (1, 2)]
    assert set(seconds) == set(read) == set(SHARING) and read["peft, flattened"] == effective
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
        side_by_side.measure({"engine": engine, "wrong": wrong}, 2, 1e-4)


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


def test_a_missed_goal_is_told() -> None:
    work = {"peak_bytes": {"engine": 300, "separate instances": 900}, "peak_bytes_of_one_task": 100}
    fast = {"engine": {"teraflops": 10.0}, "batch and pad": {"ratio": 2.5}}
    assert goals.faster_than("batch and pad", 2).told(work, fast).endswith("2.50 of 2: held")
    assert goals.faster_than("peft, cap", 2).told(work, fast).endswith("not measured")
    assert goals.bytes_of_one(1.5).told(work, fast).endswith("3.00 of at most 1.5: FAILED")
    assert goals.fewer_than_instances(5.3).told(work, fast).endswith("3.00 of 5.3: FAILED")
    assert goals.teraflops(500).told(work, fast).endswith("10.00 of 500: FAILED")
