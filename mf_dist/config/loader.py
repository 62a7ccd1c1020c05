"""Strict conversion of YAML to frozen dataclasses: an unknown key, a wrong type or a value out of range raises a
one-line UserError."""

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Callable
from contextlib import suppress
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


NULLS = ("", "null", "Null", "NULL", "~")
WHOLE = r"(0|[1-9][0-9]*(_[0-9]+)*)"
DECIMAL = rf"({WHOLE}(\.[0-9]*)?|\.[0-9]+)"
PATTERNS = {
    int: rf"[-+]?{WHOLE}",
    float: rf"[-+]?{DECIMAL}([eE][-+]?[0-9]+)?",
    Fraction: rf"{DECIMAL}|{WHOLE}/{WHOLE}",
}
"""Texts that are numbers. YAML 1.1 also reads 010 as 8, 1:30 as 90 and 0x10 as 16: these are refused."""
WORDS = {
    form(word): value
    for words, value in ((("true", "yes", "on"), True), (("false", "no", "off"), False))
    for word in words
    for form in (str.lower, str.capitalize, str.upper)
}
"""Texts of a field that is true or false."""


def read_config(cls: type[T], path: str, overrides: list[str]) -> T:
    """Reads the YAML file `path` with dotted `key=value` overrides as an instance of the dataclass `cls`."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = _parse(file)
    except OSError as error:
        raise UserError(f"cannot read config {path!r}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bad UTF-8
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{where}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as `model:`, got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return from_tree(cls, tree, path)


def _parse(source: Any) -> Any:
    """A YAML text or file as nested dicts and lists of texts, as typed, and of None: what a text means follows from the
    field's type, not from its looks. Raises yaml.YAMLError, or UserError without the file's name."""
    node = yaml.compose(source, Loader=yaml.BaseLoader)  # type: ignore[no-untyped-call]
    return None if node is None else _from_node(node)


def _from_node(node: Any, within: tuple[Any, ...] = ()) -> Any:
    line = node.start_mark.line + 1
    if node.tag not in (yaml.BaseLoader.DEFAULT_SCALAR_TAG, *CONTAINER_TAGS):
        raise UserError(f"line {line}: the tag {node.tag} is not supported, leave it out")
    if node in within:
        raise UserError(f"line {line}: an alias stands for something that contains it")
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in NULLS else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_from_node(item, (*within, node)) for item in node.value]
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, value = key_node.value, _from_node(value_node, (*within, node))
        if not isinstance(key, str):
            raise UserError(f"line {line}: a key is not a text")
        if key == "<<":
            for other in value if isinstance(value, list) else [value]:
                if not isinstance(other, dict):
                    raise UserError(f"line {line}: << needs the alias of a section")
                merged = {**other, **merged}
        elif key in own:
            raise UserError(f"duplicate key {key!r}, line {line}")
        else:
            own[key] = value
    return {**merged, **own}


CONTAINER_TAGS = (yaml.BaseLoader.DEFAULT_SEQUENCE_TAG, yaml.BaseLoader.DEFAULT_MAPPING_TAG)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r}: expected section.key=value")
    *sections, key = dotted.split(".")
    for section in sections:
        child = tree[section] = _unfolded(tree.get(section, {}))
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {section!r} is a value, not a section")
        tree = child
    tree[key] = _override_value(text)


def _override_value(text: str) -> Any:
    """The text as typed, blanks and # included; None for null; what is within quotes if all of it is quoted."""
    if text.strip() in NULLS:
        return None
    if text[0] in "'\"" and text[0] == text[-1]:
        with suppress(yaml.YAMLError, UserError):
            value = _parse(text)
            return value if isinstance(value, str) else text
    return text


def _unfolded(value: Any) -> Any:
    """A list or section that an override gives on one line, such as [1, 4]; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(yaml.YAMLError, UserError, RecursionError):
            return _parse(value)
    return value


def from_tree(cls: type[T], tree: Any, source: str, prefix: str = "") -> T:
    """A dataclass from nested dicts; `source` and `prefix` locate the value in error messages."""
    tree = _unfolded(tree)
    if not isinstance(tree, dict):
        raise UserError(f"{source}: {prefix.rstrip('.')}: expected a section of keys, got {_shown(tree)}")
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
    """The inverse of from_tree, with values that JSON and YAML can represent. Optional sections that are None are left
    out."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            hints = get_type_hints(type(value))
            items = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return {n: plain(v) for n, v in items.items() if v is not None or not _optional_section(hints[n])}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Fraction) else value

    return plain(config)  # type: ignore[no-any-return]


def _optional_section(hint: Any) -> Any:
    """The dataclass of an optional section, whose hint is `X | None`; None for another hint."""
    args = get_args(hint)
    return args[0] if args and dataclasses.is_dataclass(args[0]) else None


def _convert(value: Any, hint: Any, source: str, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_tree(hint, value, source, name + ".")  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, check = args
        converted = _convert_plain(value, kind)
        if converted is None or not check.holds(converted):
            raise UserError(f"{source}: {name}: expected {check.expected}, got {_shown(value, kind)}")
        return converted
    if origin in (types.UnionType, Union):  # the only union is `X | None`
        if section := _optional_section(hint):  # given, though perhaps without a key: all its defaults
            return from_tree(section, value or {}, source, name + ".")
        return None if value is None else _convert(value, args[0], source, name)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{source}: {name}: expected {' or '.join(args)}, got {_shown(value)}")
        return value
    converted = _convert_plain(value, hint)
    if converted is None:
        expected = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}[hint]
        raise UserError(f"{source}: {name}: expected {expected}, got {_shown(value, hint)}")
    return converted


def _shown(value: Any, kind: Any = str) -> str:
    """A wrong value in an error message; a number in another notation than the decimal one is explained."""
    if value is None:
        return "nothing"
    if not isinstance(value, str) or (kind in PATTERNS and re.fullmatch(PATTERNS[kind], value.strip())):
        return str(value)
    is_odd = kind in PATTERNS and re.match(r"[-+]?\.?[0-9]", value.strip())
    return repr(value) + (" (numbers are decimal, without leading zeros, : or 0x)" if is_odd else "")


def _convert_plain(value: Any, kind: Any) -> Any:
    """`value`, a text of a config or a number of a checkpoint's state.json, as `kind`; None if it is none."""
    if get_origin(kind) is tuple:
        value = _unfolded(value)
        items = [_convert_plain(a, get_args(kind)[0]) for a in (value if isinstance(value, list | tuple) else [value])]
        return None if None in items else tuple(items)
    if kind is bool and isinstance(value, str):
        return WORDS.get(value)
    if kind in (bool, str) or isinstance(value, bool):
        return value if type(value) is kind else None
    if isinstance(value, str):
        value = value.strip()
        return _number(value.replace("_", ""), kind) if re.fullmatch(PATTERNS[kind], value) else None
    if kind is int:
        return value if isinstance(value, int) else None
    return _number(str(value), kind) if isinstance(value, int | float) else None


def _number(text: str, kind: Any) -> Any:
    try:
        number = Fraction(text).limit_denominator(1_000_000) if kind is Fraction else kind(text)
        return number if math.isfinite(number) else None
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
