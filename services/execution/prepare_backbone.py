"""Prepares a local model for the mesh, once: `python -m services.execution.prepare_backbone SOURCE DEST`.

SOURCE is a GGUF file or a Hugging Face folder. DEST becomes a Hugging Face folder with config.json, safetensors,
tokenizer.json and tokenizer_config.json (the chat template is in it or in a file beside it), which alignment and
execution read. Only local files are read, and remote code never runs. DEST appears complete or not at all. A SOURCE
that has all these files is linked, not copied: do not move it afterwards.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

STAMP = "muxtune-source.json"
_QUANTIZED = "quantization_config"
_NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")


def prepare(source: Path, dest: Path, dtype: str = "float32") -> bool:
    """Prepares DEST. Returns False if DEST was prepared from this source before. Exits if SOURCE cannot be used."""
    stamp = _stamp(source, dtype)
    if (dest / STAMP).exists() and json.loads((dest / STAMP).read_text()) == stamp:
        return False
    dest.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=dest.parent, prefix=".preparing-"))
    try:
        partial.chmod(0o755)  # other services read the folder, perhaps as other users
        if _is_complete(source):
            _link(source, partial)
        else:
            _convert(source, partial, dtype)
        (partial / STAMP).write_text(json.dumps(stamp))
        if dest.exists():
            shutil.rmtree(dest)
        partial.rename(dest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _stamp(source: Path, dtype: str) -> dict[str, object]:
    if not source.exists():
        raise SystemExit(f"{source} does not exist: name a GGUF file or a Hugging Face folder")
    files = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.is_file())
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {"source": str(source.resolve()), "dtype": dtype, "files": stats}


def _is_complete(source: Path) -> bool:
    """Returns whether the services can read the folder as it is. Its dtype does not matter: the executor casts."""
    if not all((source / name).is_file() for name in _NEEDED) or not list(source.glob("*.safetensors")):
        return False
    try:
        config = json.loads((source / "config.json").read_text())
    except ValueError as error:
        raise SystemExit(f"{source}/config.json is not valid JSON: {error}") from error
    return _QUANTIZED not in config and "auto_map" not in config


def _link(source: Path, partial: Path) -> None:
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".txt", ".model"):
            shutil.copyfile(path, partial / path.name)
        elif path.suffix == ".safetensors":
            (partial / path.name).symlink_to(path.resolve())


def _convert(source: Path, partial: Path, dtype: str) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, extra = (source.parent, {"gguf_file": source.name}) if source.is_file() else (source, {})
    local = {"local_files_only": True, "trust_remote_code": False, **extra}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **local)
    except Exception as error:  # transformers raises many types for a folder without a model
        raise SystemExit(f"{source} does not load as a causal language model of transformers: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise SystemExit(f"{source} has no fast tokenizer: add its tokenizer.json")
    tokenizer.save_pretrained(partial)
    # A model from a GGUF file is dequantized but marked as quantized, and transformers does not save it: copy it.
    config = type(model.config).from_dict({k: v for k, v in model.config.to_dict().items() if k != _QUANTIZED})
    with torch.device("meta"):  # the weights are assigned next: no memory for random ones
        copied = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    copied.load_state_dict(model.state_dict(), assign=True)
    copied.generation_config = model.generation_config
    copied.tie_weights()
    copied.save_pretrained(partial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("dest", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments = parser.parse_args()
    done = prepare(arguments.source, arguments.dest, arguments.dtype)
    print(f"{arguments.dest}: {'prepared' if done else 'up to date'}", file=sys.stderr)


if __name__ == "__main__":
    main()
