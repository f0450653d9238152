"""Options made of the fields of a configuration: one for each, explained by its own docstring."""

import argparse
import dataclasses
import re
import types
import typing
from typing import Any, TypeVar

__all__ = ["add_fields", "read_fields"]

METAVARS = {int: "N", float: "X", str: "NAME"}

Config = TypeVar("Config")


def add_fields(parser: argparse.ArgumentParser, default: Any, title: str, prefix: str = "") -> None:
    """An option for each field of a dataclass, in a group.

    Args:
        default: an instance; the help shows its values.
        prefix: of the options' names: ``augment`` makes ``--augment-flip``.
    """
    group = parser.add_argument_group(title)
    hints, texts = typing.get_type_hints(type(default)), _explained(type(default))
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        text = re.sub(r"\s+", " ", texts[field.name]).replace("``", "").rstrip(".").replace("%", "%%")
        group.add_argument(
            "--" + _name(field.name, prefix).replace("_", "-"),
            **_kind(hints[field.name]),
            help=f"{text} ({'none' if shown in (None, '') else shown})",
        )


def read_fields(options: argparse.Namespace, default: Config, prefix: str = "") -> Config:
    """The configuration with the values that were given.

    Raises:
        ValueError: values that do not fit.
    """
    given = {field.name: getattr(options, _name(field.name, prefix)) for field in dataclasses.fields(default)}  # type: ignore[arg-type]
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    return dataclasses.replace(default, **changes)  # type: ignore[type-var]


def _name(field: str, prefix: str) -> str:
    return f"{prefix}_{field}" if prefix else field


def _kind(hint: Any) -> dict[str, Any]:
    """What argparse needs to read a value of a type."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is typing.Literal:
        return {"choices": parts}
    if origin is tuple:
        many: dict[str, Any] = {"nargs": "*"} if parts[-1] is Ellipsis else {"nargs": len(parts)}
        return {"type": parts[0], "metavar": METAVARS[parts[0]], **many}
    return {"type": hint, "metavar": METAVARS[hint]}


def _explained(config: type) -> dict[str, str]:
    """What a docstring's list of attributes says of each."""
    _, _, listed = (config.__doc__ or "").partition("Attributes:\n")
    texts: dict[str, str] = {}
    for names, text in re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {9,}.*)*)", listed, re.MULTILINE):
        texts |= dict.fromkeys(names.split(", "), text)
    return texts
