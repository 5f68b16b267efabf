"""TRL's SFTTrainer as a system of side_by_side.py, padding-free, each task through its own training loop; needs trl.

Settings are those of HF PEFT's peers, and else TRL's own: its chunked loss, which holds no logits of a whole batch, and
on a GPU its autocast to bf16. Its loop makes batches as it goes, which is in its seconds; a loop ends a round where it
tells the step's loss (`on_log`), and waits there, in a thread of its own, until it is asked for the next.
"""

import threading
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from benchmarks.systems import MAX_GRAD_NORM, Losses, System
from benchmarks.workload import Work, Workload
from engine.runtime.backbone import sharing_copy

NAME = "trl, padding free"


def load() -> None:
    """Imports what it is made of."""
    import datasets  # noqa: F401
    from trl import SFTTrainer  # noqa: F401


class Trl(System):
    """One after another, on models that share the base weights."""

    def __init__(self, model: Any, workload: Workload, num_rounds: int, adapters: Path) -> None:
        self.loops = [_Loop(sharing_copy(model), work, num_rounds, adapters) for work in workload.tasks]
        self.num_tokens = [workload.num_tokens(r) for r in range(num_rounds)]

    def run(self, round_: int) -> Losses:
        return {loop.name: loop.step() for loop in self.loops}


class _Loop(TrainerCallback):  # type: ignore[misc]
    """`trainer.train()` in a thread that runs only while `step` waits for it: no two loops at once."""

    def __init__(self, model: Any, work: Work, num_rounds: int, adapters: Path) -> None:
        self.name = work.name
        self._trainer = _trainer(model, work, num_rounds, adapters)
        self._trainer.add_callback(self)
        self._losses: list[float] = []
        self._error: BaseException | None = None
        self._asked, self._told = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def step(self) -> float:
        self._asked.release()
        self._told.acquire()
        if self._error is not None:
            raise self._error
        return self._losses[-1]

    def _train(self) -> None:
        self._asked.acquire()
        try:
            self._trainer.train()
        except BaseException as error:
            self._error = error
            self._told.release()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **rest: Any) -> None:
        if "loss" not in logs:  # the summary after the last step
            return
        self._losses.append(logs["loss"])
        self._told.release()
        if state.global_step < state.max_steps:
            self._asked.acquire()


def _trainer(model: Any, work: Work, num_rounds: int, adapters: Path) -> Any:
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    training, is_cpu = work.spec.training, model.device.type == "cpu"
    settings = SFTConfig(
        output_dir=str(adapters / "trl"), max_steps=num_rounds, per_device_train_batch_size=training.global_batch_size,
        learning_rate=training.learning_rate, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM, optim="adamw_torch_fused", train_sampling_strategy="sequential",
        padding_free=True, max_length=None, gradient_checkpointing=False, bf16=not is_cpu, use_cpu=is_cpu,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = [row.tolist() for row in work.rows]
    trainer = SFTTrainer(
        PeftModel.from_pretrained(model, adapters / work.name, is_trainable=True), settings,
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}), processing_class=_tokenizer(),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _tokenizer() -> PreTrainedTokenizerFast:
    """Rows are tokens already: it gives no more than the id of a pad that nothing is padded with."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
