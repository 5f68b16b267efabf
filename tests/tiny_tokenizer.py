"""A small byte-level BPE tokenizer with a chat template, as a prepared backbone's folder: for tests without a model."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = ["the quick brown fox jumps over the lazy dog", "user assistant system", "hello, how are you?", "1 2 3 4 5 6"]


def write_tokenizer(
    folder: Path, template: str | None = CHATML, *, eos: str = "<|im_end|>", adds_bos: bool = False, trims: bool = False
) -> Path:
    """`adds_bos`: the post-processor puts <s> first. `trims`: its offsets leave out white space, as GPT-2's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[AddedToken(t, special=True) for t in SPECIAL]
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if trims:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": eos, "__type": "AddedToken"} if adds_bos else eos,
        "pad_token": "<pad>",
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
