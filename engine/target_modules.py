"""Which of a backbone's operators a list of target modules names, read as PEFT reads it.

Source: peft.tuners.tuners_utils.check_target_module_exists (a list matches by full name or by dotted suffix) and
peft's "all-linear" (every linear operator but the output head). Only the standard library: admission, the planner and
the engine must agree.
"""

from collections.abc import Iterable, Sequence

from engine.errors import InvalidInputError

ALL_LINEAR = "all-linear"


def matching_modules(
    targets: Sequence[str], adaptable: Iterable[str], field: str = "spec.lora.target_modules"
) -> list[str]:
    """The names in `adaptable` that `targets` take, in the backbone's order. `field` is what a refusal names.

    Raises InvalidInputError, naming the target and what exists, if one matches nothing.
    """
    names = list(adaptable)
    if not targets:
        raise _refusal("is empty: name at least one module", names, field)
    if ALL_LINEAR in targets:
        if len(targets) > 1:
            raise _refusal(f'"{ALL_LINEAR}" stands alone or not at all', names, field)
        return names
    targets = list(dict.fromkeys(targets))  # said a million times, it is read once
    for target in targets:
        if not any(matches(target, name) for name in names):
            what = f'"{target}" matches no adaptable module of the backbone (all tasks share its head and embeddings)'
            raise _refusal(what, names, field)
    return [name for name in names if any(matches(target, name) for target in targets)]


def suffixes(names: Iterable[str]) -> list[str]:
    """Distinct last parts in order of appearance: what a person would name."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def matches(target: str, name: str) -> bool:
    """By full name or by dotted suffix."""
    return name == target or name.endswith("." + target)


def _refusal(what: str, names: Sequence[str], field: str) -> InvalidInputError:
    known = ", ".join(suffixes(names))
    return InvalidInputError.of_field(field, f'{what}; it has {known}, or "{ALL_LINEAR}"')
