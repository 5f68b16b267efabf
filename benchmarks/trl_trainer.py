"""Runs TRL's SFTTrainer as a system of side_by_side.py, padding-free, each task in its own training loop.

Settings are those of the HF PEFT peers, otherwise TRL's defaults: its chunked loss, which never holds the logits of a
whole batch, and on a GPU its autocast to bf16. Its loop builds batches while it runs, which is part of its seconds. A
loop ends a round when it logs the step's loss (`on_log`), and pauses there until the next round. Needs trl and
greenlet.
"""

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from benchmarks.systems import MAX_GRAD_NORM, Losses, System
from benchmarks.workload import Work, Workload
from engine.runtime.backbone import sharing_copy

NAME = "trl, padding free"


def load() -> None:
    """Imports trl and greenlet; raises ModuleNotFoundError without them."""
    import datasets  # noqa: F401
    import greenlet  # noqa: F401
    from trl import SFTTrainer  # noqa: F401


class Trl(System):
    """Trains the tasks one after another, on models that share the base weights."""

    def __init__(self, model: Any, workload: Workload, num_rounds: int, adapters: Path) -> None:
        self.loops = [_Loop(sharing_copy(model), work, num_rounds, adapters) for work in workload.tasks]
        self.num_tokens = [workload.num_tokens(r) for r in range(num_rounds)]

    def run(self, round_: int) -> Losses:
        return {loop.name: loop.step() for loop in self.loops}


class _Loop(TrainerCallback):  # type: ignore[misc]
    """Runs `trainer.train()` in a greenlet: it returns each step's loss to `step` and continues at the next call.

    It is not a thread, because libgomp keeps a team of threads for every thread that computes, and they stop spinning
    once they are more than the CPUs: with threads every system of the process took 1.4 to 1.7 times as long.
    """

    def __init__(self, model: Any, work: Work, num_rounds: int, adapters: Path) -> None:
        from greenlet import greenlet

        self.name = work.name
        trainer = _trainer(model, work, num_rounds, adapters)
        trainer.add_callback(self)
        self._greenlet: Any = greenlet(trainer.train)

    def step(self) -> float:
        """Raises what the loop raises."""
        loss: float = self._greenlet.switch()
        return loss

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **rest: Any) -> None:
        if "loss" in logs:  # not so in the summary after the last step
            self._greenlet.parent.switch(logs["loss"])


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
    """A tokenizer that only has the id of the padding token, which is never used: rows are tokens already."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
