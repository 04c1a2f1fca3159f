"""Settings: keyword-only dataclasses that say at once what is wrong with them, typed in Python, YAML or a shell."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from fractions import Fraction
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass(kw_only=True)
class Settings:
    """Base of a keyword-only dataclass that knows its fields and their types.

    Raises:
        ValueError: on creation, for a field that there is not or a value that is not of its type.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Settings:
        valid = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(kwargs) - set(valid)):
            listed = f"its fields are {', '.join(valid)}" if valid else "it has none"
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; {listed}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            require_type(field.name, value, hint)

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        fields = {f.name: (getattr(self, f.name), _default(f)) for f in dataclasses.fields(self)}
        return {name: value for name, (value, default) in fields.items() if value != default}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The default of every field, "required" where there is none."""
        return {f.name: "required" if (d := _default(f)) is MISSING else d for f in dataclasses.fields(cls)}

    @classmethod
    def missing(cls, given: Iterable[str]) -> list[str]:
        """The fields without a default that are not among the ``given`` names."""
        return [f.name for f in dataclasses.fields(cls) if _default(f) is MISSING and f.name not in given]


def parse_spec(line: str) -> tuple[str, dict[str, Any]]:
    """A name and its settings, from ``name:field=value:field=value``.

    Raises:
        ValueError: no name, or a setting without "=".
    """
    name, *settings = line.strip().split(":")
    if not name:
        raise ValueError(f"a name must come first, as in name:field=value, got {line!r}")
    return name, dict(parse_setting(setting) for setting in settings)


def spec(name: str, settings: Mapping[str, Any]) -> str:
    """The line that `parse_spec` reads."""
    written = (value if isinstance(value, str) else json.dumps(value) for value in settings.values())
    return ":".join([name, *(f"{field}={value}" for field, value in zip(settings, written, strict=True))])


def parse_setting(setting: str) -> tuple[str, Any]:
    """A field and its value, from ``field=value``.

    Raises:
        ValueError: there is no "=".
    """
    field, equals, value = setting.partition("=")
    if not field or not equals:
        raise ValueError(f"a setting is written field=value, got {setting!r}")
    return field, parse_value(value)


def parse_value(text: str) -> Any:
    """A JSON value or a share as ``1/3``; what is neither is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        numerator, slash, denominator = text.partition("/")
        is_share = slash and numerator.isdigit() and denominator.isdigit() and int(denominator)
        return float(Fraction(text)) if is_share else text


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default, `MISSING` where it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def require_type(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError where ``value``, called ``name``, is not of the type that ``hint`` says."""
    if not _fits(value, hint):
        raise ValueError(f"{name} must be {_words(hint)}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of a field's type: plain, a `Literal`, a list, a dict or a union. A bool is no number."""
    if hint is Any:
        return True
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, *get_args(hint)) for item in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(all(map(_fits, pair, get_args(hint))) for pair in value.items())
    if get_args(hint):
        return any(_fits(value, part) for part in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, hint) or (hint is float and isinstance(value, int))


def _words(hint: Any) -> str:
    if hint is Any:
        return "anything"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list, each {_words(*get_args(hint))}"
    if get_origin(hint) is dict:
        key, value = get_args(hint)
        return f"a mapping, each key {_words(key)}" + ("" if value is Any else f", each value {_words(value)}")
    if get_args(hint):
        return " or ".join(map(_words, get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, Settings):
        return f"a mapping with {', '.join(hint.missing([]))}"
    return "None" if hint is type(None) else f"of type {hint.__name__}"
