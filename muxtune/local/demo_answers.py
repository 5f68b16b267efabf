"""Prints answers before and after training, by plain transformers and peft.

    python -m muxtune.local.demo_answers JOBS.json

Runs as a separate process, so that the client needs no torch. JOBS.json: {"backbone": folder, "jobs": [{"adapter",
"prompt", "is_chat"}]}. Prints one JSON object a job: {"before", "after", "max_logit_change"}.
"""

import json
import sys
from pathlib import Path
from typing import Any

_NEW_TOKENS = 40


def main() -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    request = json.loads(Path(sys.argv[1]).read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(request["backbone"], local_files_only=True)
    base: Any = AutoModelForCausalLM.from_pretrained(request["backbone"], local_files_only=True, dtype=torch.float32)
    for job in request["jobs"]:
        text = job["prompt"]
        if job["is_chat"]:
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        model: Any = PeftModel.from_pretrained(base, job["adapter"])
        with torch.no_grad():
            with model.disable_adapter():
                before, plain = _generate(model, tokenizer, tokens), model(**tokens).logits
            after, tuned = _generate(model, tokenizer, tokens), model(**tokens).logits
        change = (tuned - plain).abs().max().item()
        print(json.dumps({"before": before, "after": after, "max_logit_change": change}), flush=True)
        base = model.unload()


def _generate(model: Any, tokenizer: Any, tokens: Any) -> str:
    ids = model.generate(**tokens, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text: str = tokenizer.decode(ids[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


if __name__ == "__main__":
    main()
