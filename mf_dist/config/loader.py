"""Strict conversion of YAML to frozen dataclasses: an unknown key, a wrong type or a value out of range raises a
one-line UserError."""

import dataclasses
import difflib
import math
import types
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from mf_dist.runtime.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Check:
    """Constraint in `Annotated[type, Check(...)]`: a description for the error message, and a predicate."""

    expected: str
    holds: Callable[[Any], bool]


class UniqueKeyLoader(yaml.SafeLoader):
    """Rejects duplicate keys, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"duplicate key {key!r}, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def read_config(cls: type[T], path: str, overrides: list[str]) -> T:
    """Reads the YAML file `path` with dotted `key=value` overrides as an instance of the dataclass `cls`."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = UniqueKeyLoader(file).get_single_data()
    except OSError as error:
        raise UserError(f"cannot read config {path!r}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bad UTF-8, or a date such as 2026-02-31
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{where}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as `model:`, got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return from_tree(cls, tree, path)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r}: expected section.key=value")
    *sections, key = dotted.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {section!r} is a value, not a section")
        tree = child
    try:
        tree[key] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        tree[key] = text


def from_tree(cls: type[T], tree: Any, source: str, prefix: str = "") -> T:
    """A dataclass from nested dicts; `source` and `prefix` locate the value in error messages."""
    if not isinstance(tree, dict):
        raise UserError(f"{source}: {prefix.rstrip('.')}: expected a section of keys, got {tree!r}")
    hints = get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in tree:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise UserError(f"{source}: unknown key {prefix}{key}; {hint}")
    values = {}
    for name, fld in fields.items():
        if name in tree:
            values[name] = _convert(tree[name], hints[name], source, prefix + name)
        elif fld.default is dataclasses.MISSING and fld.default_factory is dataclasses.MISSING:
            raise UserError(f"{source}: {prefix}{name} is missing")
    return cls(**values)


def to_tree(config: Any) -> dict[str, Any]:
    """The inverse of from_tree, with values that JSON and YAML can represent."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Fraction) else value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}


def _convert(value: Any, hint: Any, source: str, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_tree(hint, value, source, name + ".")  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, check = args
        converted = _convert_plain(value, kind)
        if converted is None or not check.holds(converted):
            raise UserError(f"{source}: {name}: expected {check.expected}, got {value!r}")
        return converted
    if origin in (types.UnionType, Union):  # the only union is `X | None`
        return None if value is None else _convert(value, args[0], source, name)
    if origin is Literal:
        if isinstance(value, bool):  # YAML 1.1 reads off as False
            value = "on" if value else "off"
        if value not in args:
            raise UserError(f"{source}: {name}: expected {' or '.join(args)}, got {value!r}")
        return value
    converted = _convert_plain(value, hint)
    if converted is None:
        expected = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}[hint]
        raise UserError(f"{source}: {name}: expected {expected}, got {value!r}")
    return converted


def _convert_plain(value: Any, kind: Any) -> Any:
    """`value` converted to `kind`, or None if that is not possible."""
    if kind is float and not isinstance(value, bool):
        return _finite(value)  # YAML 1.1 reads 1e-4 as a string
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is Fraction and isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            return Fraction(str(value)).limit_denominator(1_000_000)
        except (ValueError, ZeroDivisionError, OverflowError):
            return None
    if get_origin(kind) is tuple:
        item_kind = get_args(kind)[0]
        items = [_convert_plain(item, item_kind) for item in (value if isinstance(value, list | tuple) else [value])]
        return None if None in items else tuple(items)
    return value if kind in (bool, str) and isinstance(value, kind) else None


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
