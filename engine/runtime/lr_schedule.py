"""Learning rate by step, as transformers' get_scheduler computes it. Pure."""

import math

from engine.task import LrSchedule, Training


def learning_rate(training: Training, step: int, num_steps: int) -> float:
    """Returns the rate of step `step` (from 0): linear warm-up from 0, then constant, linear or half a cosine to 0."""
    if step < training.warmup_steps:
        return training.learning_rate * step / max(1, training.warmup_steps)
    progress = (step - training.warmup_steps) / max(1, num_steps - training.warmup_steps)
    if training.lr_schedule is LrSchedule.LINEAR:
        return training.learning_rate * max(0.0, 1 - progress)
    if training.lr_schedule is LrSchedule.COSINE:
        return training.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return training.learning_rate
