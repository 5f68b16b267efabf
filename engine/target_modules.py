"""Selection of a backbone's operators by a list of target modules, with PEFT's rules.

Source: peft.tuners.tuners_utils.check_target_module_exists (a list matches by full name or by dotted suffix) and
peft's "all-linear" (every linear operator but the output head). Only the standard library: admission, the planner and
the engine must select the same.
"""

from collections.abc import Iterable, Mapping, Sequence

from engine.errors import InvalidInputError

ALL_LINEAR = "all-linear"


def matching_modules(
    targets: Sequence[str], adaptable: Iterable[str], field: str = "spec.lora.target_modules"
) -> list[str]:
    """Return the names in `adaptable` that `targets` match, in the backbone's order.

    Raises InvalidInputError for `field` if a target matches nothing; the message lists the names that exist.
    """
    names = list(adaptable)
    if not targets:
        raise _error("is empty", names, field)
    if ALL_LINEAR in targets:
        if len(targets) > 1:
            raise _error(f'has "{ALL_LINEAR}" beside other names', names, field)
        return names
    unmatched = dict.fromkeys(targets)
    wanted, selected = set(unmatched), []
    for name in names:
        if found := wanted.intersection(dotted_suffixes(name)):
            selected.append(name)
            for target in found:
                unmatched.pop(target, None)
    for target in unmatched:
        problem = f'"{target}" matches no adaptable module of the backbone (all tasks share its head and embeddings)'
        raise _error(problem, names, field)
    return selected


def suffixes(names: Iterable[str]) -> list[str]:
    """Return the distinct last parts of dotted names, in order of appearance."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def dotted_suffixes(name: str) -> list[str]:
    """Return the targets that match `name`: the full name, and what follows each of its dots. So that many targets are
    found in many names without comparing each with each."""
    parts = name.split(".")
    return [name, *(".".join(parts[start:]) for start in range(1, len(parts)))]


def matches(target: str, name: str) -> bool:
    """Return whether `target` is the full name or a dotted suffix of it."""
    return name == target or name.endswith("." + target)


def first_match(targets: Mapping[str, object], name: str) -> str | None:
    """Return the first of `targets` that matches `name`, or None."""
    found = [suffix for suffix in dotted_suffixes(name) if suffix in targets] if targets else []
    return found[0] if len(found) == 1 else next((target for target in targets if target in found), None)


def _error(problem: str, names: Sequence[str], field: str) -> InvalidInputError:
    return InvalidInputError.of_field(
        field, f'{problem}: use names of {", ".join(suffixes(names))}, or only "{ALL_LINEAR}"'
    )
