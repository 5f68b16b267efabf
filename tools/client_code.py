"""Writes the client's code that has its source elsewhere: `python tools/client_code.py`.

muxtune/client.py, the blocking client, is muxtune/aio.py without await. The error classes in muxtune/errors.py are
those of engine/errors.py, which the client may not import; a reason is the class's name in capitals.
"""

import inspect
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine.errors

PACKAGE = Path(__file__).parents[1] / "muxtune"
BEGIN = "# Written by tools/client_code.py from engine/errors.py.\n"
END = "# End of what tools/client_code.py writes.\n"
BLOCKING = (  # pattern in muxtune/aio.py, replacement in muxtune/client.py
    (r"The asyncio client", "The blocking client"),
    (r"`muxtune\.client` is the blocking one", "`muxtune.aio` is the asyncio one"),
    (r" Files are read and written in threads\.", ""),
    (r"with one API key, from one event loop\.", "with one API key, from any thread."),
    (r"await asyncio\.to_thread\(([\w.]+)(?:, )?", r"\1("),
    (r"await upload_response\((.*)\)$", r"\1"),
    (r"from muxtune\.upload_status import upload_response\n", ""),
    (r"Awaitable\[(\w+)\]", r"\1"),
    (r"Awaitable, ", ""),
    (r"import asyncio\n", "import time\n"),
    (r"asyncio\.sleep", "time.sleep"),
    (r"grpc\.aio\.", "grpc."),
    (r"\(await (self\._\w+\(.*\))\)", r"\1"),
    (r"\b(?:async|await) ", ""),
    (r"Async(Client|Iterator)", r"\1"),
    (r"AdmissionServiceAsyncStub", "AdmissionServiceStub"),
    (r"__a(enter|exit)__", r"__\1__"),
)  # fmt: skip


def blocking_client() -> str:
    """Return muxtune/client.py, made from muxtune/aio.py."""
    text = (PACKAGE / "aio.py").read_text()
    for pattern, replacement in BLOCKING:
        text, num_found = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        assert num_found, f"{pattern} does not occur in muxtune/aio.py any more"
    return _formatted("# Written by tools/client_code.py from muxtune/aio.py.\n" + text)


def errors() -> str:
    """Return muxtune/errors.py with the classes of engine/errors.py between its two marks."""
    text = (PACKAGE / "errors.py").read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    classes = [inspect.getsource(engine.errors.FieldViolation)]
    for cls in vars(engine.errors).values():
        if inspect.isclass(cls) and engine.errors.MuxtuneError in cls.__mro__[1:]:
            base, document = cls.__bases__[0].__name__, inspect.getdoc(cls)
            reason = re.sub(r"(?<!^)([A-Z])", r"_\1", cls.__name__.removesuffix("Error")).upper()
            classes.append(f'class {cls.__name__}({base}):\n    """{document}"""\n\n    reason = "{reason}"\n')
    return _formatted("\n\n".join((before + BEGIN, *classes, END + after)))


def _formatted(text: str) -> str:
    for command in (("check", "--select", "I,UP028", "--fix", "--unsafe-fixes", "--quiet"), ("format", "--quiet")):
        arguments = [sys.executable, "-m", "ruff", *command, "--stdin-filename", "muxtune/client.py", "-"]
        text = subprocess.run(arguments, input=text, capture_output=True, text=True, check=True).stdout
    return text


GENERATED = {PACKAGE / "client.py": blocking_client, PACKAGE / "errors.py": errors}

if __name__ == "__main__":
    for path, make in GENERATED.items():
        path.write_text(make())
