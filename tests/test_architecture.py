"""Tests the rules of the code base: imports, budgets, names, and texts that must never be committed."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine.methods import METHODS
from tools import code_map

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
    """Return the Python files in these folders, without generated stubs and migrations."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    skipped = ("muxtune/v1/", "services/admission/migrations/versions/")
    return sorted(path for path in paths if not path.relative_to(ROOT).as_posix().startswith(skipped))


OURS = sources("engine", "services", "muxtune", "tests", "benchmarks", "examples", "deploy")


def test_import_rules() -> None:
    """Checks the contracts of import-linter in pyproject.toml."""
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def foreign_imports(text: str) -> set[str]:
    """Return imported packages that are neither of the standard library nor the engine's shared types."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    shared = {"engine.errors", "engine.methods.base", "engine.methods", "engine.target_modules", "engine.task"}
    names = {name for name in names if name not in shared and not name.startswith("engine.methods.")}
    return {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}


def test_shared_words_need_only_the_standard_library() -> None:
    imports = {path: foreign_imports((ROOT / path).read_text()) for path in STDLIB_ONLY}
    assert {path: names for path, names in imports.items() if names} == {}


def test_only_execution_loads_torch() -> None:
    """Imports each of the other services in a separate process, so that no indirect import is missed."""
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


def offenders(paths: Sequence[Path], check: Callable[[Path], list[str]]) -> dict[str, list[str]]:
    """Return the findings of the check by file, without files that have none."""
    assert paths
    return {path.relative_to(ROOT).as_posix(): findings for path in paths if (findings := check(path))}


def over_budget(path: Path) -> list[str]:
    text = path.read_text()
    findings = [f"{name}: {length} lines" for name, length in long_functions(text)]
    findings += [f"{lines} lines"] if (lines := len(text.splitlines())) > MAX_FILE_LINES else []
    return findings + (["a forbidden name"] if path.stem in FORBIDDEN_NAMES else [])


def test_budgets_and_names() -> None:
    assert offenders(OURS, over_budget) == {}


# The blocking client and the client's errors are written from muxtune/aio.py and engine/errors.py: the same names.
_COPIES = ("muxtune/client.py", "muxtune/errors.py")
_FRAGMENT = re.compile(r"(What|Whatever|Who|Whoever|Whose|Whom|Where|Why|When|How|Which|Of|Those|Whether)\b")


def class_names(paths: Sequence[Path]) -> dict[str, list[str]]:
    """Return by public class the files that define it."""
    files: dict[str, list[str]] = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    return files


def test_a_class_name_means_one_thing() -> None:
    paths = [path for path in sources("engine", "services", "muxtune") if not path.as_posix().endswith(_COPIES)]
    assert {name: files for name, files in class_names(paths).items() if len(files) > 1} == {}


def fragments(text: str) -> list[str]:
    """Return first sentences of docstrings that are fragments: half a question, or without a full stop."""
    sentences = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            paragraph = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            sentence = re.split(r"(?<=[.:!])\s", paragraph)[0]
            if sentence and (_FRAGMENT.match(sentence.strip("`")) or not sentence.endswith((".", ":", "!"))):
                sentences.append(sentence)
    return sentences


def test_docstrings_begin_with_a_sentence() -> None:
    paths = sources("engine", "services", "muxtune", "tools", "benchmarks")
    assert offenders(paths, lambda path: fragments(path.read_text())) == {}


def default_pool_uses(path: Path) -> list[str]:
    """Return the lines that run work on asyncio's default threads, which one tenant's calls could all hold."""
    lines = path.read_text().splitlines()
    return [line.strip() for line in lines if re.search(r"\bto_thread\(|run_in_executor\(None", line)]


def test_admission_and_alignment_leave_the_default_threads_alone() -> None:
    """`close` runs when no call is left."""
    found = offenders(sources("services/admission", "services/alignment", "services/storage"), default_pool_uses)
    assert found == {"services/admission/store/request_batcher.py": ["await asyncio.to_thread(self.close)"]}


CUDA = sorted((ROOT / "cuda").glob("*.cu*")) + sorted((ROOT / "tests" / "engine" / "kernels" / "host").glob("*.[ch]*"))


def long_cuda_functions(text: str) -> Iterator[tuple[str, int]]:
    """Yield functions over the budget: blocks that open and close at an indentation of 0 or 4 columns."""
    opened: dict[int, tuple[int, str]] = {}
    for number, line in enumerate(text.splitlines()):
        indent = len(line) - len(line.lstrip())
        if indent in (0, 4) and line.rstrip().endswith("{") and not re.match(r"\s*(struct|class|extern|union)\b", line):
            opened[indent] = (number, line.strip())
        elif indent in opened and line.lstrip().startswith("}"):
            first, name = opened.pop(indent)
            if number - first + 1 > MAX_FUNCTION_LINES:
                yield name, number - first + 1


def cuda_over_budget(path: Path) -> list[str]:
    text = path.read_text()
    findings = [f"{name}: {length} lines" for name, length in long_cuda_functions(text)]
    findings += [f"{lines} lines"] if (lines := len(text.splitlines())) > MAX_FILE_LINES else []
    findings += [f"a line of {width} columns"] if (width := max(map(len, text.splitlines()))) > 120 else []
    return findings + (["a forbidden name"] if path.stem in FORBIDDEN_NAMES - {"common"} else [])


def test_cuda_budgets_and_names() -> None:
    assert offenders(CUDA, cuda_over_budget) == {}


def test_proto_budget() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "protos").rglob("*.proto")}
    assert lengths and {name: length for name, length in lengths.items() if length > MAX_PROTO_LINES} == {}


def mutable_globals(text: str) -> list[str]:
    """Return module-level names in lower case with a mutable value: state that all importers share."""
    names = []
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
            names.append(target.id)
    return names + [name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Global) for name in node.names]


def test_no_module_level_state() -> None:
    paths = [path for path in sources("engine", "services", "muxtune") if "migrations" not in path.parts]
    assert offenders(paths, lambda path: mutable_globals(path.read_text())) == {}


def test_cuda_is_not_a_package() -> None:
    """An __init__.py there would shadow NVIDIA's `cuda` namespace, which CuPy imports."""
    assert not (ROOT / "cuda" / "__init__.py").exists()


def test_tests_are_not_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_only_conversion_knows_both_sides() -> None:
    """Elsewhere in the services a file reads protos or the engine's microbatches, never maps one to the other."""
    both = re.compile(r"alignment_pb2\.Range\(|alignment_pb2\.Segment\(|TaskSpec\(\s*backbone=\w+\.backbone,\s*method=")
    offenders = [p for p in sources("services") if p.parent.name != "conversion" and both.search(p.read_text())]
    assert offenders == []


def test_the_code_map_shows_the_files_as_they_are() -> None:
    assert code_map.PAGE.read_text() == code_map.page(), "run `python tools/code_map.py`"
    assert set(folders_of_code()) <= set(code_map.FOLDERS)


def folders_of_code() -> Iterator[str]:
    for path in OURS:
        folder = path.parent.relative_to(ROOT).as_posix()
        if not folder.startswith(("tests", "services/admission/migrations")):
            yield folder


def method_checks(text: str) -> list[str]:
    """Return the checks of a PEFT method's class: isinstance, issubclass, a comparison with type(), a match case."""
    names = {method.__name__ for method in METHODS.values()}
    nodes: list[ast.AST] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            nodes += node.args[1:]
        elif isinstance(node, ast.Compare) and "type(" in ast.unparse(node):
            nodes.append(node)
        elif isinstance(node, ast.MatchClass):
            nodes.append(node.cls)
    mentioned = [re.findall(r"\w+", ast.unparse(node)) for node in nodes]
    return [name for words in mentioned for name in words if name in names]


def test_methods_are_used_by_hooks_only() -> None:
    """A new method needs no change outside engine/methods and engine/peft: nothing else asks for its class."""
    folders = (ROOT / "engine" / "methods", ROOT / "engine" / "peft")
    paths = [path for path in sources("engine", "services", "muxtune") if path.parent not in folders]
    assert offenders(paths, lambda path: method_checks(path.read_text())) == {}


def tracked_texts() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, listed):
        path = ROOT / name
        if path.suffix not in {".png", ".binpb", ".gguf"} and path.is_file():
            yield name, path.read_text(errors="replace")


def unwelcome(text: str) -> list[str]:
    """Return hosts of package registries and absolute paths of a developer's machine."""
    registries = r"(?:py" + r"pi\.org|files\.python" + r"hosted\.org|registry\.np" + r"mjs\.org)"
    return re.findall(registries + r"|(?:^|[\s\"'=(])(?:/home/\w+|/root|/work)/[\w./-]+", text)


def test_nothing_of_this_machine_is_committed() -> None:
    hits_by_file = {name: hits for name, text in tracked_texts() if (hits := unwelcome(text))}
    assert hits_by_file == {}


NAMES_AND_KEYS = ("services/resource_names.py", "services/storage/artifact_layout.py", "muxtune/resource_names.py")
OTHER_SLASHES = {  # of files that cut something else at a slash
    "services/admission/api/oidc.py": "URLs",
    "services/rpc/tracing.py": "names of RPCs",
    "muxtune/cli/tenant.py": "names of RPCs",
}
_NAME_PART = re.compile(r"tenants/|executors/|/?(tasks|adapters|datasets|checkpoints)/|/checkpoints|/?manifest\.json"
                        r"|uploaded-|-step-|^\.execution$")  # fmt: skip
_CUTS = {"partition", "rpartition", "split", "rsplit"}


def names_made_or_cut(text: str, *, allows_slash: bool = False) -> list[str]:
    """Return string literals that are parts of a resource name or a key, and splits at a slash.

    Docstrings, and texts for readers with a space or a PLACEHOLDER, are left out.
    """
    findings, tree = [], ast.parse(text)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            is_for_readers = re.search(r"\s|\b[A-Z]{2,}\b", node.value)
            findings += [node.value] if _NAME_PART.search(node.value) and not is_for_readers else []
        is_cut = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CUTS
        if is_cut and not allows_slash and any(isinstance(a, ast.Constant) and a.value == "/" for a in node.args):
            findings.append(ast.unparse(node))
    return findings


def test_names_and_keys_are_made_and_parsed_in_one_place() -> None:
    """With two places, a change of one of them would make the garbage collector miss files or delete the wrong ones."""
    findings = {}
    for path in sources("engine", "services", "muxtune"):
        name = path.relative_to(ROOT).as_posix()
        if name not in NAMES_AND_KEYS:
            findings[name] = names_made_or_cut(path.read_text(), allows_slash=name in OTHER_SLASHES)
    assert {name: texts for name, texts in findings.items() if texts} == {}


def test_the_checks_can_fail(tmp_path: Path) -> None:
    assert foreign_imports("import torch\nfrom engine.runtime import step") == {"torch", "engine.runtime"}
    body = "\n".join(f"    x = {i}" for i in range(MAX_FUNCTION_LINES + 1))
    assert list(long_functions(f"def f():\n{body}\n")) == [("f", MAX_FUNCTION_LINES + 2)]
    statements = "\n".join(f"    x = {i};" for i in range(MAX_FUNCTION_LINES + 1))
    assert list(long_cuda_functions(f"void f(int x) {{\n{statements}\n}}\n"))
    assert list(long_cuda_functions(f"struct S {{\n{statements}\n}};\n")) == []
    long = tmp_path / "helpers.py"
    long.write_text(f"def f():\n{body}\n" + "\n" * MAX_FILE_LINES)
    assert len(over_budget(long)) == 3
    long = tmp_path / "utils.cu"
    long.write_text(f"void f(int x) {{\n{statements}\n}}\n" + "//" * 100 + "\n" * MAX_FILE_LINES)
    assert len(cuda_over_budget(long)) == 4
    assert method_checks("isinstance(m, Lora | Vera)\nmatch m:\n    case methods.Miss(): pass") == [
        "Lora",
        "Vera",
        "Miss",
    ]
    assert method_checks("type(m) is Ia3 or issubclass(type(m), (int, Prompt))") == ["Ia3", "Prompt"]
    assert mutable_globals("cache = {}\nLIMITS = {}\n") == ["cache"]
    assert mutable_globals("def f():\n    global state\n") == ["state"]
    assert fragments('"""Of its tasks."""') and fragments('def f():\n    """whether it holds"""')
    assert fragments('"""Return the tasks."""') == []
    assert unwelcome("see https://py" + "pi.org/simple and " + "/ro" + "ot/x.txt")
    snippets = ['f"{tenant}/tasks/{i}"', 'f"tenants/{i}"', 'name.replace("/tasks/", "/adapters/")', 'key.split("/")',
                're.compile(r"(tenants/[^/]+)/x")', 'f"{task}/checkpoints/{i}"', 'key = "/manifest.json"']  # fmt: skip
    assert [code for code in snippets if not names_made_or_cut(code)] == []
    assert names_made_or_cut('"""tenants/a/tasks/t"""\nhelp("tenants/TENANT", "Example: see tenants/a")') == []
