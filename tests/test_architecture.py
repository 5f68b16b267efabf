"""The rules of the house, held by tests: who may import whom, budgets, names, what must never be committed."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.tree import FOLDERS, with_tree

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PROTO_LINES = 400, 60, 250
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
STDLIB_ONLY = (
    "engine/task.py",
    "engine/methods/base.py",
    "engine/errors.py",
    "engine/target_modules.py",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "engine" / "methods").glob("*.py")),
)


def sources(*folders: str) -> list[Path]:
    """Python files of ours: generated stubs and migrations left out."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    skipped = ("muxtune/v1/", "services/admission/migrations/versions/")
    return sorted(path for path in found if not path.relative_to(ROOT).as_posix().startswith(skipped))


OURS = sources("engine", "services", "muxtune", "tests", "benchmarks", "examples", "deploy")


def test_import_rules() -> None:
    """The contracts of import-linter in pyproject.toml."""
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def foreign_imports(text: str) -> set[str]:
    """Top-level packages imported that are neither the standard library nor the engine's own words."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    own = {"engine.errors", "engine.methods.base", "engine.methods", "engine.target_modules", "engine.task"}
    names = {name for name in names if name not in own and not name.startswith("engine.methods.")}
    return {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}


@pytest.mark.parametrize("path", STDLIB_ONLY)
def test_shared_words_need_only_the_standard_library(path: str) -> None:
    assert foreign_imports((ROOT / path).read_text()) == set()


def test_only_execution_loads_torch() -> None:
    """Not by any path: each of the other services is imported in a process of its own."""
    modules = [
        "services.admission.__main__",
        "services.scheduling.__main__",
        "services.alignment.__main__",
        "muxtune.cli.main",
    ]
    for module in modules:
        code = f"import {module}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{module} loads torch or transformers: {done.stderr[-500:]}"


def long_functions(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield node.name, length


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_budgets_and_names(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert list(long_functions(text)) == []
    assert path.stem not in FORBIDDEN_NAMES


CUDA = sorted((ROOT / "cuda").glob("*.cu*")) + sorted((ROOT / "tests" / "engine" / "kernels" / "host").glob("*.[ch]*"))


def long_cuda_functions(text: str) -> Iterator[tuple[str, int]]:
    """Blocks that open at a line of no or four columns' indentation and close at the same: functions, in our layout."""
    opened: dict[int, tuple[int, str]] = {}
    for number, line in enumerate(text.splitlines()):
        indent = len(line) - len(line.lstrip())
        if indent in (0, 4) and line.rstrip().endswith("{") and not re.match(r"\s*(struct|class|extern|union)\b", line):
            opened[indent] = (number, line.strip())
        elif indent in opened and line.lstrip().startswith("}"):
            first, name = opened.pop(indent)
            if number - first + 1 > MAX_FUNCTION_LINES:
                yield name, number - first + 1


@pytest.mark.parametrize("path", CUDA, ids=lambda path: path.name)
def test_cuda_budgets_and_names(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES and max(map(len, text.splitlines())) <= 120
    assert list(long_cuda_functions(text)) == []
    assert path.stem not in FORBIDDEN_NAMES - {"common"}


@pytest.mark.parametrize("path", sorted((ROOT / "protos").rglob("*.proto")), ids=lambda path: path.name)
def test_proto_budget(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_PROTO_LINES


def mutable_globals(text: str) -> list[str]:
    """Module-level names in lower case bound to something that can change: state shared by whoever imports it."""
    found = []
    for node in ast.parse(text).body:
        target = (
            node.targets[0]
            if isinstance(node, ast.Assign)
            else node.target
            if isinstance(node, ast.AnnAssign)
            else None
        )
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        is_container = isinstance(value, ast.Dict | ast.List | ast.Set | ast.ListComp | ast.DictComp)
        if (
            isinstance(target, ast.Name)
            and is_container
            and not target.id.lstrip("_").isupper()
            and target.id != "__all__"
        ):
            found.append(target.id)
    return found + [name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Global) for name in node.names]


@pytest.mark.parametrize("path", sources("engine", "services", "muxtune"), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_module_level_state(path: Path) -> None:
    if "migrations" not in path.parts:
        assert mutable_globals(path.read_text()) == []


def test_cuda_is_no_package() -> None:
    """An __init__.py there would shadow NVIDIA's `cuda` namespace, which CuPy imports."""
    assert not (ROOT / "cuda" / "__init__.py").exists()


def test_tests_are_no_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_only_conversion_knows_both_sides() -> None:
    """Elsewhere in the services a file reads protos or the engine's microbatches, never maps one to the other."""
    both = re.compile(r"alignment_pb2\.Range\(|alignment_pb2\.Segment\(|TaskSpec\(\s*backbone=\w+\.backbone,\s*method=")
    offenders = [p for p in sources("services") if p.parent.name != "conversion" and both.search(p.read_text())]
    assert offenders == []


def test_the_readme_shows_the_tree_as_it_is() -> None:
    page = (ROOT / "README.md").read_text()
    assert page == with_tree(page), "run `python docs/tree.py`"
    assert set(tree_of_packages()) <= set(FOLDERS)


def tree_of_packages() -> Iterator[str]:
    for path in OURS:
        folder = path.parent.relative_to(ROOT).as_posix()
        if not folder.startswith(("tests", "services/admission/migrations")):
            yield folder


def tracked_texts() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, listed):
        path = ROOT / name
        if path.suffix not in {".png", ".binpb", ".gguf"} and path.is_file():
            yield name, path.read_text(errors="replace")


def unwelcome(text: str) -> list[str]:
    """Hosts of package registries and absolute paths of somebody's machine."""
    registries = r"(?:py" + r"pi\.org|files\.python" + r"hosted\.org|registry\.np" + r"mjs\.org)"
    return re.findall(registries + r"|(?:^|[\s\"'=(])(?:/home/\w+|/root|/work)/[\w./-]+", text)


def test_nothing_of_this_machine_is_committed() -> None:
    found = {name: hits for name, text in tracked_texts() if (hits := unwelcome(text))}
    assert found == {}


def test_the_checks_can_fail() -> None:
    assert foreign_imports("import torch\nfrom engine.runtime import step") == {"torch", "engine.runtime"}
    body = "\n".join(f"    x = {i}" for i in range(MAX_FUNCTION_LINES + 1))
    assert list(long_functions(f"def f():\n{body}\n")) == [("f", MAX_FUNCTION_LINES + 2)]
    statements = "\n".join(f"    x = {i};" for i in range(MAX_FUNCTION_LINES + 1))
    assert list(long_cuda_functions(f"void f(int x) {{\n{statements}\n}}\n"))
    assert list(long_cuda_functions(f"struct S {{\n{statements}\n}};\n")) == []
    assert mutable_globals("cache = {}\nLIMITS = {}\n") == ["cache"]
    assert mutable_globals("def f():\n    global state\n") == ["state"]
    assert unwelcome("see https://py" + "pi.org/simple and " + "/ro" + "ot/x.txt")
