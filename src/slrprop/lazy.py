"""Packages whose names are loaded when they are first asked for, so that what needs little starts quickly."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """A package whose public names stand in modules, ``homes``.

    Where a function and a module have one name, like ``slrprop.plan``, it is the function's, also once the module is loaded.
    """

    def __getattr__(self, name: str) -> Any:
        home = vars(self)["_homes"].get(name)
        if home is None and (name.startswith("_") or find_spec(f"{self.__name__}.{name}") is None):
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        module = import_module(f"{self.__name__}.{home or name}")
        return vars(self).setdefault(name, getattr(module, name) if home else module)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in vars(self)["_homes"] or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})


def lazily(package: str, names: dict[str, str]) -> None:
    """Let a package load these names when they are asked for, by the module of the package that has them."""
    homes = {name: home for home, several in names.items() for name in several.split()}
    module = sys.modules[package]
    vars(module).update(_homes=homes, __all__=[*vars(module).get("__all__", ()), *homes])
    module.__class__ = _Package
