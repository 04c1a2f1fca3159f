"""Method configs: what a user types, what `config.json` stores, and how the methods are found.

A method is one file in `reducers/`, `projectors/` or `decoding/`, or a module that a third party names in the
entry-point group ``mllm_vision.methods``. Nothing else lists it.
"""

from __future__ import annotations

import functools
import importlib.util
import pkgutil
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, ClassVar

from mllm_vision.settings import Settings, parse_spec

KIND_PACKAGES = ("reducers", "projectors", "decoding")
ENTRY_POINT_GROUP = "mllm_vision.methods"

_CONFIGS: dict[str, type[MethodConfig]] = {}


@dataclass(kw_only=True)
class MethodConfig(Settings):
    """Base of every method's settings: a keyword-only dataclass, validated on creation.

    A subclass names itself in its class line: ``class HiPruneConfig(KeepConfig, type="hiprune", paper="arXiv ...")``.
    """

    type: ClassVar[str]
    kind: ClassVar[str]
    paper: ClassVar[str]
    needs_weights: ClassVar[bool] = False

    def __init_subclass__(cls, *, type: str | None = None, paper: str = "", kind: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if kind is not None:
            cls.kind = kind
        if type is not None:
            cls.type, cls.paper = type, paper
            known = _CONFIGS.setdefault(type, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"two methods are called {type!r}: {known.__module__} and {cls.__module__}")
            _CONFIGS[type] = cls

    def to_dict(self) -> dict[str, Any]:
        """The type and the fields that differ from their defaults, as stored in `config.json`."""
        return {"type": self.type} | self.changed()

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> MethodConfig:
        """The config that `to_dict` stored.

        Raises:
            ValueError: no type, or a type or field that nobody knows; the message lists those that exist.
        """
        if "type" not in stored:
            raise ValueError(f"a method needs a 'type', got {stored!r}; {_known()}")
        config, given = config_class(stored["type"]), {k: v for k, v in stored.items() if k != "type"}
        if set(given) <= set(config.defaults()) and (missing := config.missing(given)):
            raise ValueError(f"{stored['type']} needs {', '.join(missing)}")
        return config(**given)


@dataclass(frozen=True)
class MethodInfo:
    """One row of `methods()`: the defaults of ``fields`` are their values, "required" where there is none."""

    name: str
    kind: str
    paper: str
    needs_weights: bool
    fields: dict[str, Any]
    config: type[MethodConfig]


def config_class(name: str) -> type[MethodConfig]:
    """The config class of the method called ``name``.

    Raises:
        ValueError: nobody knows that name; the message lists the names that exist.
    """
    discover()
    if name not in _CONFIGS:
        raise ValueError(f"unknown method {name!r}; {_known()}")
    return _CONFIGS[name]


def parse_methods(spec: str, kind: str | None = None) -> list[MethodConfig]:
    """The configs that a line of text names, as ``downsample:keep=1/2+hiprune:keep=64``.

    Args:
        spec: Methods joined by "+", each a name and its ``:field=value`` settings.
        kind: What they all have to be ("reducer", "decoding", ...); None for anything.

    Raises:
        ValueError: an unknown method, field or value, or a method of another kind.
    """
    configs = []
    for part in spec.split("+"):
        name, settings = parse_spec(part)
        config = MethodConfig.from_dict({"type": name} | settings)
        if kind is not None and config.kind != kind:
            known = ", ".join(row.name for row in methods() if row.kind == kind) or "none yet"
            raise ValueError(f"{name} is a method of kind {config.kind}, not {kind}; of that kind there are {known}")
        configs.append(config)
    return configs


def methods() -> list[MethodInfo]:
    """Every method that is installed, sorted by kind and name."""
    discover()
    rows = []
    for name, config in _CONFIGS.items():
        rows.append(MethodInfo(name, config.kind, config.paper, config.needs_weights, config.defaults(), config))
    return sorted(rows, key=lambda row: (row.kind, row.name))


@functools.cache
def discover() -> None:
    """Import every method file, ours and third parties', so that each registers its config."""
    for kind in KIND_PACKAGES:
        if importlib.util.find_spec(f"mllm_vision.{kind}") is not None:
            package_modules(f"mllm_vision.{kind}")
    for point in entry_points(group=ENTRY_POINT_GROUP):
        point.load()


@functools.cache
def package_modules(package: str) -> tuple[ModuleType, ...]:
    """Every module of a package, imported."""
    path = importlib.import_module(package).__path__
    return tuple(importlib.import_module(f"{package}.{info.name}") for info in pkgutil.iter_modules(path))


def exported(package: str, name: str) -> Any:
    """`name` from the module of ``package`` that lists it in its ``__all__``: a package's ``__getattr__``.

    Raises:
        AttributeError: no module lists it; the message names what they do list.
    """
    found = {n: module for module in package_modules(package) for n in module.__all__}
    if name not in found:
        raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(found))}")
    return getattr(found[name], name)


def _known() -> str:
    discover()
    return f"the methods are {', '.join(sorted(_CONFIGS))}"
