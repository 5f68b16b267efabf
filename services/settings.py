"""Reads settings from environment variables: one frozen dataclass a service, built once in its `__main__.py`."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

PREFIX = "MUXTUNE_"
T = typing.TypeVar("T")


class SettingsError(SystemExit):
    """A setting is missing or invalid. Ends the process with a message that names the variable."""


def from_environment(cls: type[T], environ: Mapping[str, str]) -> T:
    """Build `cls` from the environment: `field` is read from `MUXTUNE_FIELD`; an empty value counts as unset.

    Raises SettingsError that lists every missing and every invalid variable.
    """
    hints = typing.get_type_hints(cls)
    values, problems = {}, []
    for spec in dataclasses.fields(cls):  # type: ignore[arg-type]
        name = PREFIX + spec.name.upper()
        text = environ.get(name, "")
        if text:
            try:
                values[spec.name] = _parse(hints[spec.name], text)
            except ValueError as error:
                problems.append(f"{name}: {error}")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            problems.append(f"{name} is not set")
    if problems:
        raise SettingsError(f"{cls.__name__}: " + "; ".join(problems))
    return cls(**values)


def environment_of(settings: Any) -> dict[str, str]:
    """Return the variables from which `from_environment` builds an equal object."""
    pairs = ((f.name, getattr(settings, f.name)) for f in dataclasses.fields(settings))
    return {PREFIX + name.upper(): str(value) for name, value in pairs if value is not None}


def _parse(hint: Any, text: str) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f'"{text}" is neither true nor false')
        return text.lower() in ("true", "1")
    return hint(text)
