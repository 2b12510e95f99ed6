"""A command line, and a YAML file, made from the fields of dataclasses: names, types, defaults and
help have no second source.

Not jsonargparse: its 4.53 reads no type of a frozen dataclass that inherits fields, so that methods
went unchecked, and it loses `--method.train.gamma`. Here a method is written as in Python,
`DeepClean(gamma=2.0)`, on the command line, in a file and in a report alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

C = TypeVar("C")


class Misused(ValueError):
    """A command line or a file of options that cannot be followed."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are raised."""

    def error(self, message: str) -> NoReturn:
        """Raises Misused."""
        raise Misused(f"{message}; --help shows how it is written")


def add_options(parser: argparse.ArgumentParser, options: type[Any]) -> None:
    """Adds an option for each field: `Annotated[type, "help"]`; lists take several values."""
    parser.add_argument("--config", type=Path, help="a YAML file of options, field: value")
    words = "print the options as such a file, and end"
    parser.add_argument("--print-config", action="store_true", help=words)
    for field, kind, text, _ in _fields(options):
        names = [f"--{field.name.replace('_', '-')}"]
        names += [f"--{field.name}"] if "_" in field.name else []
        told = _default(field)
        shown = "" if told in (None, []) else f" (default: {told})"
        shown = " (required)" if told is dataclasses.MISSING else shown
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{text}{shown}"}
        if kind is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **settings)
            continue
        settings["metavar"] = _metavar(kind)
        if _is_list(kind):
            settings |= {"nargs": "+", "action": "extend"}
        parser.add_argument(*names, **settings)


def read(options: type[C], given: Mapping[str, Any], unknown: Sequence[str] = ()) -> C:
    """The options: from the command line, else from the file, else the defaults.

    Raises Misused for what argparse found to be `unknown`, a value that is not of the field's type,
    an unknown field of the file, and a required field without a value.
    """
    refuse(unknown, [f"--{field.name.replace('_', '-')}" for field, *_ in _fields(options)])
    fields = {entry[0].name: entry for entry in _fields(options)}
    path = given.get("config")
    found = {} if path is None else _file(path, set(fields))
    where = dict.fromkeys(found, f"{path}: ")
    for name in fields.keys() & given.keys():
        found[name], where[name] = given[name], ""
    values, missing = {}, []
    for name, (field, kind, _, least) in fields.items():
        label = f"--{name.replace('_', '-')}"
        if name in found:
            label = f"{where[name]}{name}" if where[name] else label
            values[name] = _converted(kind, found[name], label)
            _require_least(values[name], least, label)
        elif _default(field) is dataclasses.MISSING:
            missing.append(label)
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        raise Misused(f"{', '.join(missing)} {verb} missing; --help says what to give")
    return options(**values)


def refuse(unknown: Sequence[str], known: Sequence[str]) -> None:
    """Raises Misused if anything is unknown, with the known names that are close."""
    for name in unknown:
        close = difflib.get_close_matches(name, known, n=2)
        near = f"close are {', '.join(close)}" if close else "--help lists what there is"
        raise Misused(f"there is no option {name}; {near}")


def as_yaml(options: Any) -> str:
    """The options as the text of a file for `--config`."""
    import yaml

    plain = {
        field.name: _plain(getattr(options, field.name)) for field in dataclasses.fields(options)
    }
    text: str = yaml.safe_dump(plain, sort_keys=False)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _file(path: Path, known: set[str]) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as missing:
        raise Misused(
            f"--config needs PyYAML: pip install 'deepclean-hooks[cli]' ({missing})"
        ) from missing
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as reason:
        mark = getattr(reason, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        words = getattr(reason, "problem", None) or getattr(reason, "strerror", None) or reason
        raise Misused(f"{path}{line}: {words}; write YAML, field: value") from reason
    if not isinstance(found, dict):
        raise Misused(f"{path}: holds {type(found).__name__}, not fields; write YAML, field: value")
    found = {str(name).replace("-", "_"): value for name, value in found.items()}
    for name in found.keys() - known:
        close = difflib.get_close_matches(name, known, n=2) or sorted(known)
        raise Misused(f"{path}: there is no option {name!r}; close are {', '.join(close)}")
    return found


def _require_least(value: Any, least: list[float], label: str) -> None:
    """A float is above the least value, a whole number may be equal to it."""
    for each in value if isinstance(value, list) else [value]:
        above = isinstance(each, float)
        if least and each is not None and (each <= least[0] if above else each < least[0]):
            words = "above" if above else "at least"
            raise Misused(f"{label} must be {words} {least[0]}, got {each}; correct it")


def _fields(options: type[Any]) -> list[tuple[dataclasses.Field[Any], Any, str, list[float]]]:
    """Each field with its type, without None, its help, and its least value, if it has one."""
    hints = get_type_hints(options, include_extras=True)
    found = []
    for field in dataclasses.fields(options):
        kind, text, *least = get_args(hints[field.name])  # all fields are Annotated
        if get_origin(kind) in (Union, types.UnionType):
            (kind,) = (each for each in get_args(kind) if each is not type(None))
        found.append((field, kind, text, least))
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is list


def _metavar(kind: Any) -> str:
    kind = get_args(kind)[0] if _is_list(kind) else kind
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _converted(kind: Any, value: Any, label: str) -> Any:
    if value is None:
        return None
    if _is_list(kind):
        several = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        return [_converted(get_args(kind)[0], each, label) for each in several]
    if kind is bool:
        if not isinstance(value, bool):
            raise Misused(f"{label} is true or false, got {value!r}; correct it")
        return value
    words = {int: "a whole number", float: "a number"}.get(kind, "a text")
    try:
        if isinstance(value, dict | list) or (kind is int and isinstance(value, float)):
            raise ValueError
        return kind(value) if kind is not str else str(value)
    except ValueError:
        raise Misused(f"{label} is {words}, got {value!r}; correct it") from None
