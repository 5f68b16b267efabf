"""Write the seconds of each test file, from pytest's JUnit XML, into a column of tests/DURATIONS.md.

    python -m pytest --junitxml=report.xml ...
    python tools/test_durations.py "make test" report.xml

A column of that name is replaced; the others stay.
"""

import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

PAGE = Path(__file__).parents[1] / "tests" / "DURATIONS.md"
Table = dict[str, dict[str, float]]  # by file or group, then by column
HEAD = """# How long the tests take

`tools/test_durations.py` writes this page from JUnit reports. The seconds are sums over all workers, with fixtures.
By the clock, on two cores with three workers and little else at work, the tests of `make test` took 9 min 38 s on
2026-12-01 (one process took 32 minutes before). The columns below were measured while other work used the machine,
"before" while more of it did.
"""


def seconds_by_file(report: Path) -> dict[str, float]:
    """Seconds of each file's tests, set-up and tear-down included."""
    seconds: Counter[str] = Counter()
    for case in ET.parse(report).iter("testcase"):
        seconds[case.get("classname", "").replace(".", "/").removeprefix("tests/") + ".py"] += float(
            case.get("time", 0)
        )
    return dict(seconds)


def group_of(file: str) -> str:
    """The folder, two levels deep; the tests of a whole mesh are a group."""
    folders = file.split("/")[:-1]
    return "/".join(folders[:2]) or ("whole mesh" if file.startswith("test_mesh") else "rules of the repository")


def read_table(page: str) -> Table:
    """The seconds by file of a page that this tool wrote."""
    lines = page.partition("| file |")[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    columns = rows[0] if rows else []
    return {
        file: {column: float(cell) for column, cell in zip(columns, cells, strict=True) if cell}
        for file, *cells in rows[2:]
    }


def write_table(table: Table, columns: list[str]) -> str:
    """The page: minutes by group, then seconds by file, longest first."""
    groups: dict[str, Counter[str]] = {}
    for file, seconds in table.items():
        groups.setdefault(group_of(file), Counter()).update(seconds)
        groups.setdefault("", Counter()).update(seconds)
    total = groups.pop("", Counter())
    minutes = [
        (name, {c: value / 60 for c, value in of.items()}) for name, of in [*sorted(groups.items()), ("all", total)]
    ]
    files = sorted(table.items(), key=lambda row: (-row[1].get(columns[-1], 0), row[0]))
    by_group, by_file = grid("group", columns, minutes), grid("file", columns, files)
    return f"{HEAD}\n## Minutes by group\n\n{by_group}\n## Seconds by file\n\n{by_file}"


def grid(first: str, columns: list[str], rows: list[tuple[str, dict[str, float]]]) -> str:
    lines = [[first, *columns], ["---", *["---:"] * len(columns)]]
    lines += [[name, *(f"{of[c]:.1f}" if c in of else "" for c in columns)] for name, of in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(column: str, report: str) -> None:
    table = read_table(PAGE.read_text()) if PAGE.exists() else {}
    columns = [name for name in dict.fromkeys(name for of in table.values() for name in of) if name != column]
    updated: Table = {file: {name: of[name] for name in columns if name in of} for file, of in table.items()}
    for file, seconds in seconds_by_file(Path(report)).items():
        updated.setdefault(file, {})[column] = seconds
    PAGE.write_text(write_table({file: of for file, of in updated.items() if of}, [*columns, column]))


if __name__ == "__main__":
    main(*sys.argv[1:])
