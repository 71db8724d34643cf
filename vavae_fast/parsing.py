"""From YAML and `key.path=value` overrides to frozen dataclasses; every mistake is one line naming key and cure.

The schemas stand in `schema.py` and `tokenizer_schema.py`. Scalars follow YAML 1.2 (`1e-4` is a number, `no` is text);
aliases, duplicate keys and files over 100 kB are refused. Nothing here imports torch, so that `--help` and config errors
answer at once.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vavae_fast.errors import BadInput, is_number

T = TypeVar("T")

MAX_BYTES = 100_000  # PyYAML takes seconds for as many; our longest config has 3,000
MAX_DEPTH = 20
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """Safe, with the scalars of YAML 1.2's core schema in place of YAML 1.1's."""

    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not supported; write the value out", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value.replace(".inf", "inf").replace(".nan", "nan")))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def shipped_configs() -> Path:
    """The folder of our configs: inside the package where a wheel was installed, at the top of the repository in a checkout."""
    package = Path(__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file; where there is none at "configs/NAME.yaml", ours of that name. `BadInput` names file and line."""
    path = Path(path)
    if path.parent == Path("configs") and not path.exists() and (shipped_configs() / path.name).is_file():
        path = shipped_configs() / path.name
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)  # a device or a pipe has no size
        if len(data) > MAX_BYTES:
            raise BadInput(f"{path}: over {MAX_BYTES // 1_000} kB; this is not a config")
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such config file{_nearest_file(path)}") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder; give the config file in it") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not UTF-8 text; save the config as UTF-8") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise BadInput(f"{path}: " + ("empty" if value is None else f"holds {_kind(value)}, not keys and values") + "; expected a config")
    return value


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; `source` names it in errors."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _construct(loader, node, source, 0)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise BadInput(f"{source}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise BadInput(f"{source}: nested too deeply; a config has at most {MAX_DEPTH} levels") from None
    finally:
        if loader is not None:
            loader.dispose()


def _construct(loader: _Loader, node: yaml.Node, source: str, depth: int) -> Any:
    where = f"{source}:{node.start_mark.line + 1}"
    if depth > MAX_DEPTH:
        raise BadInput(f"{where}: nested too deeply; a config has at most {MAX_DEPTH} levels")
    if node.tag not in _TAGS:
        raise BadInput(f"{where}: tag {node.tag} is not supported; write the value without it")
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                raise BadInput(f"{where}: keys must be plain words")
            if key in result:
                raise BadInput(f"{source}:{key_node.start_mark.line + 1}: duplicate key {key!r}; keep one of the two")
            result[key] = _construct(loader, value_node, source, depth + 1)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, source, depth + 1) for item in node.value]
    try:
        return loader.construct_object(node)
    except (ValueError, KeyError):
        raise BadInput(f"{where}: cannot read {_show(node.value)}") from None


def apply_overrides(mapping: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `mapping` with each `key.path=value` set; values parse as YAML. A group in a list goes by its `name`."""
    result = _copy(mapping)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key or not all(key.split(".")):
            raise BadInput(f"{text!r}: expected key.path=value, for example train.max_steps=1000")
        place = result
        *parents, last = key.split(".")
        for parent in parents:
            place = _inside(place, parent, key)
        if isinstance(place, list):
            raise BadInput(f"{key}: stands in a list; give the whole list, or one key of one of its groups")
        place[last] = parse_yaml(value, key)
    return result


def _inside(place: dict[str, Any] | list[Any], word: str, key: str) -> dict[str, Any] | list[Any]:
    """The group `word` of a group, made where there is none; of a list the group with that name."""
    if isinstance(place, list):
        named = _by_name(place)
        if word not in named:
            raise BadInput(f"{key}: no {word!r} in the list; it has {', '.join(named) or 'no groups with names'}")
        return named[word]
    if not isinstance(place.get(word), dict | list):
        place[word] = {}
    return place[word]


def _by_name(items: list[Any]) -> dict[str, dict[str, Any]]:
    """The groups of a list that have names."""
    return {item["name"]: item for item in items if isinstance(item, dict) and isinstance(item.get("name"), str)}


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def to_dataclass(schema: type[T], mapping: Mapping[str, Any], prefix: str = "") -> T:
    """`mapping` as a `schema`; unknown keys, wrong types and values out of range are `BadInput` naming the key."""
    fields = {f.name: f for f in dataclasses.fields(schema)}
    hints = typing.get_type_hints(schema)
    for key in mapping:
        if key not in fields:
            raise BadInput(f"unknown key {prefix}{key}.{_did_you_mean(schema, key, prefix)}")
    values = {key: _convert(hints[key], value, prefix + key) for key, value in mapping.items()}
    missing = [prefix + n for n, f in fields.items() if n not in values and f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        raise BadInput(f"{missing[0]}: missing; set it in the config or as {missing[0]}=VALUE")
    try:
        return schema(**values)
    except BadInput as error:
        raise BadInput(f"{prefix}{error}") from None


def _convert(hint: Any, value: Any, key: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    options = [option for option in options if option is not type(None)]
    if isinstance(value, dict) and any(dataclasses.is_dataclass(option) for option in options):
        return to_dataclass(next(option for option in options if dataclasses.is_dataclass(option)), value, key + ".")
    for option in options:
        converted = _scalar_or_list(option, value, key)
        if converted is not _NO:
            return converted
    if value is None and len(options) == 1 and dataclasses.is_dataclass(options[0]):
        return to_dataclass(options[0], {}, key + ".")
    raise BadInput(f"{key}: expected {' or '.join(_hint_name(option) for option in options)}, got {_show(value)}{_number_hint(value)}")


_NO = object()


def _scalar_or_list(option: Any, value: Any, key: str) -> Any:
    """`value` as `option`, or `_NO` when it is none."""
    origin = typing.get_origin(option)
    if origin is typing.Literal:
        return value if any(value == c and type(value) is type(c) for c in typing.get_args(option)) else _NO
    if origin in (list, tuple):
        if not isinstance(value, list):
            return _NO
        items = typing.get_args(option)
        fixed = origin is tuple and items[-1] is not Ellipsis
        if fixed and len(value) != len(items):
            return _NO
        hints = items if fixed else items[:1] * len(value)
        return origin(_convert(h, v, f"{key}[{i}]") for i, (h, v) in enumerate(zip(hints, value)))
    if option is dict or origin is dict:
        return value if isinstance(value, dict) else _NO
    if option is float and is_number(value):
        return float(value)
    return value if option in (int, str, bool) and type(value) is option else _NO


def to_mapping(config: Any) -> dict[str, Any]:
    """The dataclass as plain values that `read_yaml` gives back."""
    plain = dataclasses.asdict(config)
    return _plain(plain)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def to_yaml(config: Any) -> str:
    return yaml.dump(to_mapping(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`. A list of groups with names is as a group of them."""
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, list) and value and len(_by_name(value)) == len(value):
            value = _by_name(value)
        if isinstance(value, Mapping) and value:
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def _did_you_mean(schema: type, key: str, prefix: str) -> str:
    names = [f.name for f in dataclasses.fields(schema)]
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f" Did you mean {prefix}{close[0]}?" if close else f" Known here: {', '.join(names)}."


def _nearest_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else shipped_configs()
    names = {file.name: file for file in folder.glob("*.y*ml")}
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
    return f"; did you mean {names[close[0]]}?" if close else ""


def _kind(value: Any) -> str:
    kinds = {dict: "a group of keys", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _hint_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (list, tuple):
        return "a list"
    if dataclasses.is_dataclass(hint):
        return "a group of keys"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, "a group of keys")


def _show(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _number_hint(value: Any) -> str:
    """A quoted number is text; say so."""
    return "; remove the quotes" if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", value) else ""
