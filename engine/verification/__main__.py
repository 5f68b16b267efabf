"""Runs the verification: `python -m engine.verification` prints one JSON object per line for `muxtune verify`.

Each object is a finding or a method that the backbone does not support. The last one says whether all findings hold.
"""

import argparse
import dataclasses
import json
import logging
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from engine.verification.cases import METHODS, small_backbone
from engine.verification.report import compare, unsupported_methods


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--backbone", type=Path)
    arguments = parser.parse_args()
    names = [name for name in arguments.methods.split(",") if name]
    if unknown := sorted(set(names) - set(METHODS)):
        parser.error(f"--methods: {unknown[0]} is unknown; choose from {', '.join(METHODS)}")
    silence_libraries()
    model, all_hold = load_model(arguments.backbone), True
    for unsupported in unsupported_methods(model, names):
        names.remove(unsupported.method)
        print(json.dumps({"left_out": unsupported.method, "reason": unsupported.reason}), flush=True)
    for finding in compare(model, names, arguments.steps):
        all_hold &= finding.holds
        print(json.dumps({**dataclasses.asdict(finding), "holds": finding.holds}), flush=True)
    print(json.dumps({"verified": all_hold}), flush=True)
    return 0 if all_hold else 1


def silence_libraries() -> None:
    """Hides the warnings and progress bars of peft and transformers, which would appear between the findings."""
    disable_progress_bar()
    logging.captureWarnings(True)
    warnings.simplefilter("ignore")


def load_model(folder: Path | None) -> torch.nn.Module:
    """Loads the model in the folder; without a folder, makes the small backbone."""
    if folder is None:
        small: torch.nn.Module = small_backbone()
        return small
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    return model.eval()


if __name__ == "__main__":
    raise SystemExit(main())
