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
    "engine/methods": "one file a method: its options; the standard library only",
    "engine/alignment": "from rows to microbatches; no torch",
    "engine/planning": "pure functions over a snapshot; no torch",
    "engine/planning/cost": "seconds and bytes that tasks cost",
    "engine/planning/placement": "which task runs on which executor, and why",
    "engine/planning/fusion": "which tasks share microbatches",
    "engine/planning/simulation": "the planner on pipelines and on arrival traces",
    "engine/peft": "one file a method: its adapter in torch",
    "engine/kernels": "Python entry points of the kernels, with references in torch",
    "engine/kernels/multi_lora": "the low-rank products of many tasks",
    "engine/runtime": "the backbone, the fused step, checkpoints, export",
    "engine/verification": "the report of `muxtune verify`: fused training against training alone",
    "cuda": "CUDA C++ sources: kernels and shared headers",
    "services": "settings, telemetry and names that every service uses",
    "services/rpc": "gRPC servers and channels: authentication, authorization, limits, errors, spans of calls",
    "services/conversion": "conversion between protos and dataclasses",
    "services/storage": "the artifact store",
    "services/concurrency": "how tenants share threads, computation, memory and disk within a process",
    "services/admission": "the service that clients call, and the owner of the database",
    "services/admission/api": "the RPCs that clients, operators and scheduling call",
    "services/admission/policy": "rules that accept or refuse tasks and uploads",
    "services/admission/ledger": "durable state of scheduling: leases, attempts, results",
    "services/admission/store": "the database and its tables",
    "services/admission/cleanup": "garbage collection in the artifact store",
    "services/scheduling": "the scheduling cycle: snapshot, plan, commit, send; nothing durable",
    "services/alignment": "datasets and microbatches",
    "services/execution": "the executor: a server, and its trainer",
    "services/execution/server": "the gRPC server, its lease and its trainer's process",
    "services/execution/trainer": "the training loop and the lifecycle of its tasks",
    "deploy": "images, Docker Compose and Kubernetes manifests",
    "examples": "example datasets, a task's YAML, two clients",
    "benchmarks": "benchmarks against other systems; RESULTS.md, raw figures in `results/`, plots in `plots/`",
    "tests": "in the same folders as the code; `contract/` for the protos, `test_mesh.py` for four processes",
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
