"""Makes a local model ready for the mesh, once: `python -m services.execution.prepare_backbone SOURCE DEST`.

SOURCE is a GGUF file or a Hugging Face folder. DEST becomes a Hugging Face folder with config.json, safetensors,
tokenizer.json and tokenizer_config.json (chat template inside or beside): what alignment and execution read. Local
files only, never remote code; DEST appears whole or not at all. A folder that has all of it is linked, not copied:
it must stay where it is.
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
    """True if work was done, False if DEST is of this source already. Exits with a sentence if SOURCE won't do."""
    stamp = _stamp(source, dtype)
    if (dest / STAMP).exists() and json.loads((dest / STAMP).read_text()) == stamp:
        return False
    dest.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=dest.parent, prefix=".preparing-"))
    try:
        partial.chmod(0o755)  # other services read it, perhaps as other users
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
        raise SystemExit(f"{source}: no such file or folder; name a GGUF file or a Hugging Face folder")
    files = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.is_file())
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {"source": str(source.resolve()), "dtype": dtype, "files": stats}


def _is_complete(source: Path) -> bool:
    """Whether the folder is already what the services read. Its dtype does not matter: the executor casts."""
    if not all((source / name).is_file() for name in _NEEDED) or not list(source.glob("*.safetensors")):
        return False
    try:
        config = json.loads((source / "config.json").read_text())
    except ValueError as error:
        raise SystemExit(f"{source}/config.json does not parse: {error}") from error
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
    except Exception as error:  # whatever transformers raises for a folder that is no model
        raise SystemExit(f"{source}: not a causal language model that transformers reads: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise SystemExit(f"{source}: its tokenizer has no fast form (tokenizer.json)")
    tokenizer.save_pretrained(partial)
    # A GGUF file comes out dequantized but marked quantized, which transformers won't save: take a clean model.
    config = type(model.config).from_dict({k: v for k, v in model.config.to_dict().items() if k != _QUANTIZED})
    with torch.device("meta"):  # its weights come next: none are made up first
        clean = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    clean.load_state_dict(model.state_dict(), assign=True)
    clean.generation_config = model.generation_config
    clean.tie_weights()
    clean.save_pretrained(partial)


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
