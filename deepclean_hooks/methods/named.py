"""A method from its text, written as in Python: `SSD(alpha=5)`."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from deepclean_hooks import methods
from deepclean_hooks.measure.batch_mean import BatchMean
from deepclean_hooks.methods.method import Method


def table() -> dict[str, type[Method]]:
    """Every method by the name of its class."""
    found = {name: getattr(methods, name) for name in methods.__all__}
    return {
        name: kind
        for name, kind in found.items()
        # Not isinstance(kind, type): Python 3.10 says so of dict[str, Tensor] too.
        if isinstance(kind, type(Method)) and issubclass(kind, Method) and kind is not Method
    }


def named(text: str, provided: Mapping[str, Any] | None = None) -> Method:
    """The method that a text names: `DeepClean`, `DeepClean(gamma=1.5, max_selected=0.1)`,
    `NegGradPlus(train=DeepClean(gamma=1.1))`; nothing of the text is run.

    `provided` has values for fields that a text cannot say or need not: `held_out`, `classes`.
    They are taken where the method has no default for the field, and where it is to be tuned.
    Raises ValueError for anything else than a method with values for its fields.
    """
    try:
        found = _value(ast.parse(text.strip(), mode="eval").body, text, provided or {})
    except SyntaxError as reason:
        raise ValueError(
            f"{text!r} is no method: {reason.msg}; write it as in Python, such as "
            "DeepClean(gamma=2.0)"
        ) from reason
    if not isinstance(found, Method):
        raise ValueError(f"{text!r} is no method; {_known('')}")
    return found


def _value(node: ast.expr, text: str, provided: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return _made(node.id, [], {}, text, provided)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        given = [_value(each, text, provided) for each in node.args]
        named = {k.arg: _value(k.value, text, provided) for k in node.keywords if k.arg is not None}
        return _made(node.func.id, given, named, text, provided)
    try:
        return ast.literal_eval(node)
    except ValueError as reason:
        raise ValueError(
            f"{text!r}: {ast.unparse(node)} is neither a plain value nor a method; write it as in "
            "Python, such as DeepClean(gamma=2.0)"
        ) from reason


def _made(
    name: str, given: list[Any], named: dict[str, Any], text: str, provided: Mapping[str, Any]
) -> Any:
    kind: Any = BatchMean if name == "BatchMean" else table().get(name)
    if kind is None:
        raise ValueError(f"{name!r} is no method; {_known(name)}")
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    unknown = sorted(named.keys() - fields.keys())
    if unknown or len(given) > len(fields):
        raise ValueError(
            f"{text!r}: {name} has no setting {unknown[0] if unknown else given[-1]!r}; its "
            f"settings are {', '.join(fields) or 'none'}"
        )
    for position, field in enumerate(fields.values()):
        if position < len(given) or field.name in named or not is_required(field):
            continue
        if field.name not in provided:
            raise ValueError(f"{name} needs {field.name}; give it, or choose another method")
        named[field.name] = provided[field.name]
    made = kind(*given, **named)
    if isinstance(made, Method) and made.is_open and "held_out" in provided:
        made = dataclasses.replace(made, held_out=provided["held_out"])  # type: ignore[type-var]  # every method is a dataclass
    return made


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a dataclass's field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _known(name: str) -> str:
    close = difflib.get_close_matches(name, table(), n=2)
    return f"close are {', '.join(close)}" if close else f"there are {', '.join(sorted(table()))}"
