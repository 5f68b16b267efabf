"""The Adapter class of each method: `ADAPTER` in the file with the method's name."""

import importlib

from engine.methods import METHODS
from engine.methods.base import Method
from engine.peft.adapter import Adapter

ADAPTERS: dict[str, type[Adapter]] = {name: importlib.import_module(f"engine.peft.{name}").ADAPTER for name in METHODS}


def adapter_class(method: Method) -> type[Adapter]:
    return ADAPTERS[method.name]
