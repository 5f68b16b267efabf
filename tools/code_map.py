"""Write docs/code_map.md: one line for each file, from the first sentence of its docstring.

Run `python tools/code_map.py` after adding, moving or rewording a file; a test compares the page with the files.
"""

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SUFFIXES = (".py", ".proto", ".cu", ".cuh")
FOLDERS = {
    "protos/muxtune/v1": "the contracts; `image.binpb` above is what `buf breaking` compares with",
    "muxtune": "the Python client; `v1/` holds the generated stubs",
    "muxtune/cli": "the `muxtune` command",
    "muxtune/local": "a mesh on one machine: `muxtune up` and `muxtune demo`",
    "engine": "everything that is not a service: no grpc, no opentelemetry",
    "engine/methods": "one file a method: what a task may ask for; the standard library only",
    "engine/alignment": "from rows to microbatches; no torch",
    "engine/planning": "pure functions over a snapshot; no torch",
    "engine/planning/cost": "seconds and bytes that tasks cost",
    "engine/planning/placement": "which task runs on which executor, and why",
    "engine/planning/fusion": "which tasks share microbatches",
    "engine/planning/simulation": "the planner on pipelines and on arrival traces",
    "engine/peft": "one file a method, on one interface",
    "engine/kernels": "the checked entries to the kernels, with their references in torch",
    "engine/kernels/multi_lora": "the low-rank products of many tasks",
    "engine/runtime": "the backbone, the fused step, checkpoints, export",
    "engine/verification": "the report of `muxtune verify`: fused against alone",
    "cuda": "CUDA C++ sources: kernels, and what they share",
    "services": "what every service stands on",
    "services/rpc": "servers, channels, who may call what, errors and spans of calls",
    "services/conversion": "the only code that maps protos to dataclasses",
    "services/storage": "the artifact store",
    "services/admission": "the only address of clients, the only database",
    "services/admission/api": "the RPCs that clients, operators and scheduling call",
    "services/admission/policy": "whether a task or an upload is accepted",
    "services/admission/ledger": "the durable side of scheduling",
    "services/admission/store": "the database and its tables",
    "services/admission/cleanup": "what nobody needs any more is removed",
    "services/scheduling": "snapshot, plan, commit, send; nothing durable",
    "services/alignment": "datasets and microbatches",
    "services/execution": "the executor: a server, and its trainer",
    "services/execution/server": "the gRPC server, its lease and its trainer's process",
    "services/execution/trainer": "the training loop and the life of tasks in it",
    "deploy": "images and compose",
    "examples": "our own datasets, a task's YAML, two clients",
    "benchmarks": "against peers; RESULTS.md, raw figures in `results/`, plots in `plots/`",
    "tests": "mirrors the tree; `contract/` for the protos, `test_mesh.py` for four processes",
    "docs": "pages for readers; decisions in `adr/`",
    "tools": "scripts for developers of muxtune",
}
PAGE = ROOT / "docs" / "code_map.md"
_WIDTH = 28
_HEAD = """# Code map

Each folder and file with the first sentence of its docstring. `python tools/code_map.py` writes this page.

"""


def page() -> str:
    """Return the whole page."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    blocks = []
    for folder, purpose in FOLDERS.items():
        lines = [f"## {folder}", "", f"{purpose[0].upper()}{purpose[1:]}.", ""]
        paths = [ROOT / name for name in sorted(listed) if name.rpartition("/")[0] == folder]
        shown = [path for path in paths if path.suffix in _SUFFIXES and path.name != "__init__.py" and path.is_file()]
        if shown and folder != "tests":
            files = [f"{path.name:<{_WIDTH}} {first_sentence(path)}" for path in shown]
            lines += ["```", *files, "```", ""]
        blocks.append("\n".join(lines))
    return _HEAD + "\n".join(blocks)


def first_sentence(path: Path) -> str:
    text = path.read_text()
    if path.suffix == ".proto":
        return text.partition("\n")[0].removeprefix("// ").removesuffix(".")
    if path.suffix in (".cu", ".cuh"):
        return re.split(r"\. |\.$|:$", text.partition("\n")[0].removeprefix("// "))[0]
    whole = " ".join((ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].split())
    return re.split(r"\. |\.$", whole)[0]


if __name__ == "__main__":
    PAGE.write_text(page())
