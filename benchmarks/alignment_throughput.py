"""Measures how many rows and tokens per second alignment reads, beside `tokenizers` alone on the same texts.

    PYTHONPATH=. python benchmarks/alignment_throughput.py [--rows 20000]

Alignment parses JSON Lines, checks every row, renders chat templates, encodes, finds the tokens that bear loss, and
packs rows into microbatches. The peer is `encode_batch_fast` on the rendered texts, with its default of one thread per
core. The time of each includes freeing its temporary memory. The tokenizer is SmolLM2's; rows are words of WORDS, of
log-normal length (median 40 words). The two run in turn, block by block, so that a ratio compares runs close in time.
If other processes use the machine, the ratio of CPU seconds is the more reliable one.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks import report
from benchmarks.models import smollm2
from engine.alignment.dataset import TokenizedDataset, tokenize_dataset
from engine.alignment.jsonl_rows import parse_lines
from engine.alignment.packing import PackedTask, one_round
from engine.alignment.tokenizer import BackboneTokenizer
from engine.task import Training

GOAL = 0.7  # of the peer's rate
BLOCK_ROWS, REPEATS = 2000, 5
WORDS = (
    "adapters tenants share one frozen backbone and each of them trains its own small factors while tokens of all "
    "flow through the same operators in one stream; nobody waits for a copy, 42 tasks fit where 3 did, and answers stay"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--backbone", type=Path, help="SmolLM2 as a Hugging Face folder or GGUF file")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="muxtune-bench-") as scratch:
        folder = smollm2(arguments.backbone, Path(scratch))
        ours, peer = BackboneTokenizer.load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
        gc.collect()
        gc.freeze()  # as the service does at its start (services/rpc/server.py)
        measured = {shape: measure(rows, ours, peer) for shape, rows in rows_of(arguments.rows).items()}
    raw = report.origin("alignment_throughput") | {"rows": arguments.rows, "shapes": measured}
    if arguments.no_write:
        print(section(raw))
    else:
        report.write(raw, section(raw))


def rows_of(count: int) -> dict[str, list[dict[str, Any]]]:
    random, words = np.random.default_rng(20260601), WORDS.split()

    def text() -> str:
        return " ".join(random.choice(words, max(1, round(random.lognormal(np.log(40), 0.5)))))

    return {
        "text": [{"text": text()} for _ in range(count)],
        "prompt_completion": [{"prompt": text(), "completion": " " + text()} for _ in range(count)],
        "messages": [
            {"messages": [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]}
            for _ in range(count)
        ],
    }


def measure(rows: list[dict[str, Any]], ours: BackboneTokenizer, peer: Tokenizer) -> dict[str, Any]:
    """Return the seconds of each block, by wall clock and CPU: alignment's reading, its packing, and the peer."""
    training = Training(1e-3, num_epochs=1, max_sequence_tokens=8192, global_batch_size=64, micro_batch_size=64)
    blocks: dict[str, list[list[float]]] = {"read": [], "pack": [], "tokenizers": []}
    num_tokens = 0
    for block in [rows[at : at + BLOCK_ROWS] for at in range(0, len(rows), BLOCK_ROWS)]:
        lines, texts = [json.dumps(row).encode() for row in block], [rendered(row, ours) for row in block]
        for repeat in range(REPEATS + 1):
            dataset, *read = timed(lambda lines=lines: tokenize_dataset(parse_lines(lines), ours, training))  # type: ignore[misc]
            _, *packed = timed(lambda dataset=dataset: pack(dataset, training))  # type: ignore[misc]
            _, *alone = timed(lambda texts=texts: len(peer.encode_batch_fast(texts, add_special_tokens=False)))  # type: ignore[misc]
            if repeat:  # the first warms up
                for name, seconds in (("read", read), ("pack", packed), ("tokenizers", alone)):
                    blocks[name].append(seconds)
        num_tokens += len(dataset.token_ids_S)
    return {
        "num_rows": len(rows),
        "num_tokens": num_tokens,
        "num_blocks": len(blocks["read"]) // REPEATS,
        "seconds": blocks,
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return the result of the call and its seconds by wall clock and CPU."""
    started, used = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - started, time.process_time() - used


def rendered(row: Mapping[str, Any], ours: BackboneTokenizer) -> str:
    if "messages" in row:
        assert ours.template is not None
        return ours.template.render(row["messages"])
    return row.get("text") or row["prompt"] + row["completion"]


def pack(dataset: TokenizedDataset, training: Training) -> int:
    """Pack all microbatches of one epoch. Return their number."""
    num_steps = -(-dataset.num_rows // training.global_batch_size)
    member = PackedTask("task", dataset, training, num_steps, 0)
    return sum(len(one_round(step, [(member, step)], 8192, 64)) for step in range(num_steps))


def section(raw: Mapping[str, Any]) -> str:
    rows: list[list[object]] = []
    for shape, figures in raw["shapes"].items():
        seconds = {name: np.array(values) for name, values in figures["seconds"].items()}  # [blocks, (wall, CPU)]
        read, packed, alone = (np.median(seconds[name][:, 0]) for name in ("read", "pack", "tokenizers"))
        wall, cpu = (seconds["tokenizers"] / seconds["read"]).T
        low, ratio, high = np.percentile(wall, [25, 50, 75])
        num_rows, num_tokens = (figures[of] / figures["num_blocks"] for of in ("num_rows", "num_tokens"))
        rows.append([
            shape, f"{num_rows / read:,.0f}", f"{num_tokens / read:,.0f}",
            f"{num_tokens / alone:,.0f}", f"{num_tokens / packed:,.0f}",
            f"{ratio:.2f} ({low:.2f} to {high:.2f}), {'held' if ratio >= GOAL else 'failed'}", f"{np.median(cpu):.2f}",
        ])  # fmt: skip
    header = [
        "rows of",
        "rows/s",
        "tokens/s",
        "tokenizers alone, tokens/s",
        "packing, tokens/s",
        f"ratio (goal {GOAL}; quartiles)",
        "ratio of CPU seconds",
    ]
    return f"""
## Alignment: reading a dataset beside the tokenizer alone

{report.describe_origin(dict(raw))}
{raw["rows"]} rows of each shape in blocks of {BLOCK_ROWS}, each {REPEATS} times; medians over all of them.

{report.table(header, rows)}

Raw figures: `results/alignment_throughput.json`.
"""


if __name__ == "__main__":
    main()
