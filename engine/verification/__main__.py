"""`python -m engine.verification`: one JSON object a finding, and a last one that says whether all hold. For `muxtune
verify`, which shows them as a table."""

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
from engine.verification.report import compare


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--backbone", type=Path)
    arguments = parser.parse_args()
    names = [name for name in arguments.methods.split(",") if name]
    if unknown := sorted(set(names) - set(METHODS)):
        parser.error(f"--methods: {unknown[0]} is none of {', '.join(METHODS)}")
    disable_progress_bar()
    logging.captureWarnings(True)
    warnings.simplefilter("ignore")
    model = small_backbone() if arguments.backbone is None else _load(arguments.backbone)
    all_hold = True
    for finding in compare(model, names, arguments.steps):
        all_hold &= finding.holds
        print(json.dumps({**dataclasses.asdict(finding), "holds": finding.holds}), flush=True)
    print(json.dumps({"verified": all_hold}), flush=True)
    return 0 if all_hold else 1


def _load(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    return model.eval()


if __name__ == "__main__":
    raise SystemExit(main())
