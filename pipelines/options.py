"""Makes a checked config of a YAML file, `--set` and flags; errors name the key, its place and what was expected.

Route: words of the command line -> values and where each came from -> the job's pydantic `Config`.
Precedence: config file < `--set key=value` and `--key value`, the later of these wins. Dotted keys reach nested models.
A renamed key is taken by its old name too (`pplug/settings.py`). Nothing heavy is imported: `--help` stays quick.
No library does this: pydantic-settings, jsonargparse, tyro and Hydra read files and flags too, but lose the line of the
file, so that an error could not say `fit.max_grad_norm: got 0 (job.yaml, line 2), expected greater than 0`.
"""

import ast
import difflib
import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from infra.errors import InputError
from pplug import yaml_text
from pplug.settings import Settings, underscored, warn_renamed

Key = tuple[str, ...]
_LISTS = (list, tuple, set, frozenset, Sequence)
_DICTS = (dict, Mapping)


@dataclass
class ParsedOptions:
    """Options that the user gave: nested values, and per dotted key the place it came from."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)

    def put(self, key: Key, value: Any, place: str) -> None:
        level = self.values
        for depth, part in enumerate(key[:-1], start=1):
            level = level.setdefault(part, {})
            if not isinstance(level, dict):
                above = ".".join(key[:depth])
                raise InputError(
                    f"{place}: {above} is {_show(level)} ({self.place(key[:depth])}), so nothing can be set below it"
                )
        if isinstance(level.get(key[-1]), dict) and isinstance(value, dict):
            for name, below in value.items():
                self.put((*key, str(name)), below, place)
        else:
            level[key[-1]] = value
        self.places[key] = place

    def place(self, key: Key) -> str:
        """The nearest place known: that of the key itself, or of what it lies in."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.places:
                return self.places[key[:end]]
        return ""


# --- reading --------------------------------------------------------------------------------------------------------


def read(words: list[str], config: type[BaseModel]) -> ParsedOptions:
    """Reads the words after the job's name; a `--config` file counts first, wherever it stands."""
    given = ParsedOptions()
    settings: list[tuple[str, str, str]] = []  # key, text, place
    files: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        first = getattr(config, "positional", None) if len(rest) + 1 == len(words) else None
        if first is not None and not word.startswith("-"):
            settings.append((first, word, first))
            continue
        if not word.startswith("--") or word == "--":
            raise InputError(f"unexpected word {word!r}: a value follows its key, as in --key value or --set key=value")
        name, equals, inline = word[2:].partition("=")
        if name == "config":
            files.append(inline if equals else _next(rest, word, "a YAML file"))
        elif name == "set":
            pairs = [inline] if equals else [_next(rest, word, "key=value")]
            while not equals and rest and not rest[0].startswith("--"):
                pairs.append(rest.pop(0))
            for pair in pairs:
                key, equal_sign, text = pair.partition("=")
                if not equal_sign or not key:
                    raise InputError(f"--set {pair}: expected key=value, as in --set buckets=16")
                settings.append((key, text, f"--set {key}"))
        else:
            known = annotation_at(config, _present(tuple(underscored(name).split(".")), config))
            if not equals and bool in _leaves(known) and not (rest and rest[0].lower() in ("true", "false")):
                inline = "true"  # a switch needs no value
            elif not equals:
                if known is None:
                    raise InputError(f"--{name}: unknown option{_near(f'--{name}', config)}")
                inline = _next(rest, word, spell(known))
            settings.append((name, inline, f"--{name}"))
    if len(files) > 1:
        raise InputError(f"--config is given {len(files)} times ({', '.join(files)}): one file, the rest by --set")
    for path in files:
        _read_file(path, given, config)
    spelled: dict[Key, str] = {}
    several: dict[Key, list[Any]] = {}
    for key, text, place in settings:
        key = underscored(key, given.values) if place == f"--{key}" else key
        path_of_key = _present(tuple(key.split(".")), config)
        annotation = annotation_at(config, path_of_key)
        if annotation is None:
            raise InputError(f"{place}: unknown option{_near(place.removeprefix('--set '), config)}")
        if path_of_key in spelled and spelled[path_of_key] != key:
            raise InputError(f"{place}: {_names(path_of_key, config)} is given by both of its names; keep the new one")
        if path_of_key in spelled and _is_list(annotation) and not repeats(annotation):
            raise InputError(f"{place} is given twice: several values are written with commas, a,b")
        value = _renamed(_value(text, annotation, place), path_of_key, config, place)
        several.setdefault(path_of_key, []).append(value)
        spelled[path_of_key] = key
        all_given = several[path_of_key]
        given.put(path_of_key, all_given if repeats(annotation) and len(all_given) > 1 else value, place)
    return given


def _next(rest: list[str], word: str, wanted: str) -> str:
    if not rest or rest[0].startswith("--"):
        raise InputError(f"{word} needs a value: {wanted}")
    return rest.pop(0)


def _read_file(path: str, given: ParsedOptions, config: type[BaseModel]) -> None:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml_text.load(text)
    except FileNotFoundError:
        shipped = sorted(p.name for p in (Path(__file__).parent / "configs").glob("*.yaml"))
        hint = difflib.get_close_matches(Path(path).name, shipped, n=1)
        nearby = f"; did you mean pipelines/configs/{hint[0]}?" if hint else ""
        raise InputError(f"--config {path}: there is no such file (looked in {Path.cwd()}){nearby}") from None
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--config {path}: not UTF-8 (byte {error.start}); expected a YAML text file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"--config {path}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if values is None:
        return
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: expected a mapping of keys to values, got {_show(values)}")
    _note_places(node, (), path, given, config)
    given.values = _renamed(values, (), config, f"--config {path}")


def _note_places(node: yaml.Node | None, above: Key, path: str, given: ParsedOptions, config: type[BaseModel]) -> None:
    """Notes the line of every key, and refuses what YAML would lose in silence: a key given twice."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        place = f"{path}, line {key_node.start_mark.line + 1}"
        if key_node.tag != "tag:yaml.org,2002:str":
            raise InputError(f"--config {place}: keys are words, got {_show(key_node.value)}")
        key = _present((*above, key_node.value), config)
        if key in given.places:
            raise InputError(f"--config {place}: {_names(key, config)} is given twice, first in {given.places[key]}")
        given.places[key] = place
        _note_places(value_node, key, path, given, config)


def _value(text: str, annotation: Any, place: str) -> Any:
    """Reads one value as its field wants it: a text as it stands, a list with commas, the rest as YAML."""
    leaves = _leaves(annotation)
    others = {bool, int, float} & set(leaves)
    if type(None) in leaves and text in ("null", "~"):
        return None
    if any(leaf in (str, Path) or isinstance(leaf, str) for leaf in leaves):
        value = yaml_text.load_or_text(text) if others and text else text
        return value if type(value) in others else text
    if _is_list(annotation) and not text.lstrip().startswith("["):
        item = next((get_args(leaf)[0] for leaf in leaves if get_origin(leaf) in _LISTS), Any)
        if str not in _leaves(item):
            return [_value(part.strip(), item, place) for part in text.split(",") if part.strip()]
        try:
            return yaml_text.texts(text)
        except ValueError as error:
            raise InputError(f"{place}: {error}, as in {place}='[\"\\n\"]'") from None
    dicts = [leaf for leaf in leaves if (get_origin(leaf) or leaf) in _DICTS]
    if dicts and "=" in text and not text.startswith("{"):
        pairs, kind = (pair.partition("=") for pair in text.split(",")), (*get_args(dicts[0]), Any, Any)[1]
        return {key.strip(): _value(below.strip(), kind, place) for key, _, below in pairs}
    try:
        return yaml_text.load(text)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or error
        raise InputError(f"{place}: {text!r} is not a value YAML reads ({why})") from None


# --- renamed keys ---------------------------------------------------------------------------------------------------


def renames(above: Key, config: type[BaseModel]) -> dict[str, str]:
    """Old name -> present name of the fields below a key."""
    models = [model for model in _models(annotation_at(config, above)) if issubclass(model, Settings)]
    return {old: new for model in models for old, new in model.renames().items()}


def _present(key: Key, config: type[BaseModel]) -> Key:
    """The key by the present names of its fields; warns when it was given by an old one."""
    present: Key = ()
    for part in key:
        present = (*present, renames(present, config).get(part, part))
    if present != key:
        warn_renamed(".".join(key), ".".join(present))
    return present


def _names(key: Key, config: type[BaseModel]) -> str:
    """The key as messages name it, with its old name where it has one."""
    old = next((f" (before: {old})" for old, new in renames(key[:-1], config).items() if new == key[-1]), "")
    return ".".join(key) + old


def _renamed(value: Any, above: Key, config: type[BaseModel], place: str) -> Any:
    """A value whose keys, at any depth, are the present ones."""
    if not isinstance(value, dict):
        return value
    found: dict[Any, Any] = {}
    for name, below in value.items():
        key = _present((*above, str(name)), config)
        if key[-1] in found:
            raise InputError(f"{place}: {_names(key, config)} is given by both of its names; keep the new one")
        found[key[-1] if key[-1] != str(name) else name] = _renamed(below, key, config, place)
    return found


# --- checking -------------------------------------------------------------------------------------------------------


def check(config: type[BaseModel], given: ParsedOptions) -> BaseModel:
    """Builds the config.

    Raises:
        InputError: a line for each wrong key: key, what was given and where, what was expected, the nearest known key.
    """
    try:
        return config.model_validate(given.values)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(detail, config, given) for detail in error.errors(include_url=False)))
        raise InputError("\n".join(f"  {line}" for line in lines)) from None


def _explain(error: ErrorDetails, config: type[BaseModel], given: ParsedOptions) -> str:
    key = _key_of(error["loc"], given.values)
    name = ".".join(key)
    place = given.place(key)
    came_from = f" ({place})" if place else ""
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    annotation = annotation_at(config, key)
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown key{came_from}{_near(name, config)}"
    if error["type"] == "missing":
        about = next((f": {text}" for k, _, text, _ in fields_of(config) if k == key and text), "")
        return f"{name}: missing, expected {spell(annotation)}{about}; give --{name.replace('_', '-')} VALUE"
    if error["type"] in ("value_error", "assertion_error"):
        return f"{name}{came_from}: {message}" if name else message
    expected = message.removeprefix("Input should be ")
    got = error["input"]
    line = f"{name}: got {_show(got)}{came_from}, expected {expected}"
    if isinstance(got, str):
        choices = [leaf for leaf in _leaves(annotation) if isinstance(leaf, str)]
        close = difflib.get_close_matches(got, choices, n=1)
        line += f"; did you mean {close[0]}?" if close else ""
    elif error["type"] == "string_type" and got is not None and not isinstance(got, list | dict):
        line += "; put quotes around it in the file"
    return line


def _key_of(loc: Sequence[int | str], values: Any) -> Key:
    """The user's key for an error: pydantic's location without the names it adds for branches of a union."""
    key: list[str] = []
    for at, part in enumerate(loc):
        last = at == len(loc) - 1
        if isinstance(values, dict) and (part in values):
            values = values[part]
        elif isinstance(values, list | tuple) and isinstance(part, int) and part < len(values):
            values = values[part]
        elif not (last and isinstance(values, dict)):
            continue
        key.append(str(part))
    return tuple(key)


def _near(name: str, config: type[BaseModel]) -> str:
    """`; did you mean x? Known: ...` for an unknown key, which may also have lost or gained its prefix."""
    dashes, name = name[: 2 * name.startswith("--")], name.removeprefix("--").replace("-", "_")
    *above, last = name.split(".")
    models = _models(annotation_at(config, tuple(above))) if above else [config]
    siblings = [f for model in models for f in model.model_fields]
    every = [".".join(key) for key, *_ in fields_of(config)]
    close = [".".join([*above, near]) for near in difflib.get_close_matches(last, siblings, n=1)]
    close = close or [key for key in every if key.split(".")[-1] == last] or difflib.get_close_matches(name, every, n=1)
    known = f" Known {'below ' + '.'.join(above) if above else 'keys'}: {', '.join(siblings)}" if siblings else ""
    return (f"; did you mean {dashes}{close[0]}?" if close else "." * bool(known)) + known


# --- describing -----------------------------------------------------------------------------------------------------


def describe(config: type[BaseModel]) -> str:
    """Every field as a flag with its type, default and what it is for."""
    lines = []
    for key, annotation, about, default in fields_of(config):
        tail = "required" if default is PydanticUndefined else f"default {_default(default)}"
        lines.append(f"  --{'.'.join(key).replace('_', '-')}  {spell(annotation)}  [{tail}]")
        if about:
            lines.append(textwrap.fill(" ".join(about.split()), 110, initial_indent=" " * 8, subsequent_indent=" " * 8))
    return "\n".join(lines)


def fields_of(config: type[BaseModel]) -> Iterator[tuple[Key, Any, str, Any]]:
    """Key, type with bounds, description and default of each field that takes a value, nested ones with dotted keys."""
    yield from _fields(config, (), None)


def _fields(config: type[BaseModel], above: Key, instance: BaseModel | None) -> Iterator[tuple[Key, Any, str, Any]]:
    docs = _attribute_docs(config)
    for name in _in_order(config):
        info = config.model_fields[name]
        key = (*above, name)
        default = getattr(instance, name, None) if instance is not None else info.get_default(call_default_factory=True)
        models = _models(info.annotation)
        if not models or default is None:
            yield key, _with_bounds(info), info.description or docs.get(name, ""), default
        for model in models:
            yield from _fields(model, key, default if isinstance(default, model) else None)


def _in_order(config: type[BaseModel]) -> list[str]:
    """Names of the fields: inherited ones that must be given, then those of the class itself, then its bases'."""
    own = [[name for name in inspect.get_annotations(owner) if name in config.model_fields] for owner in config.__mro__]
    needed = [name for names in own[1:] for name in names if config.model_fields[name].is_required()]
    return list(dict.fromkeys([*needed, *(name for names in own for name in names)]))


def _with_bounds(info: FieldInfo) -> Any:
    return Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation


def _attribute_docs(config: type[BaseModel]) -> dict[str, str]:
    """The string below each field, as the house style writes it; pydantic keeps these only when asked to."""
    docs: dict[str, str] = {}
    for owner in reversed(config.__mro__):
        if not (issubclass(owner, BaseModel) and owner is not BaseModel):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        except (OSError, TypeError, SyntaxError):  # no source at hand: a class made at run time
            continue
        for line, below in zip(body, body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Expr):
                if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                    docs[line.target.id] = inspect.cleandoc(below.value.value)
    return docs


def spell(annotation: Any) -> str:
    """A type in words a user types: `text`, `integer > 0`, `auto|lamp|jsonl`, `a,b,... of text`, `number or null`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "length >=", "max_length": "length <="}
        known = [(sign, getattr(m, attribute, None)) for m in args[1:] for attribute, sign in signs.items()]
        bounds = [f"{sign} {bound}" for sign, bound in known if bound is not None]
        kind, or_null, _ = spell(args[0]).partition(" or null")
        return " ".join([kind, *bounds]) + or_null
    if repeats(annotation):
        return "text, may be given again" + (" or null" if type(None) in args else "")
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(spell(a) for a in args))
    if origin is Literal:
        return "|".join(map(str, args))
    if (origin or annotation) in _LISTS:
        inner = [a for a in args if a is not Ellipsis]
        return "a,b,..." + (f" of {spell(inner[0])}" if inner else "")
    if (origin or annotation) in _DICTS:
        return "key=value,..."
    names: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "true|false", Path: "path"}
    names[type(None)] = "null"
    return names.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _default(value: Any) -> str:
    if isinstance(value, list | tuple | set | frozenset):
        return ",".join(map(_default, value)) or "none given"
    if isinstance(value, dict):
        return ",".join(f"{k}={_default(v)}" for k, v in value.items()) or "none given"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(value) if isinstance(value, str) and (not value or value != value.strip()) else str(value)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- types of fields ------------------------------------------------------------------------------------------------


def annotation_at(config: type[BaseModel], key: Key) -> Any:
    """The type of the field a dotted key names, or None; what lies below a dict has the dict's value type."""
    annotation: Any = config
    for part in key:
        found = [m.model_fields[part] for m in _models(annotation) if part in m.model_fields]
        if found:
            annotation = _with_bounds(found[0])
            continue
        dicts = [leaf for leaf in _leaves(annotation) if (get_origin(leaf) or leaf) in _DICTS]
        if not dicts:
            return None
        annotation = (*get_args(dicts[0]), Any, Any)[1]
    return annotation


def _leaves(annotation: Any) -> list[Any]:
    """The branches of a type: unions opened, Annotated taken off, the words of a Literal themselves."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _leaves(args[0])
    if origin in (Union, types.UnionType):
        return [leaf for a in args for leaf in _leaves(a)]
    return list(args) if origin is Literal else [annotation]


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [leaf for leaf in _leaves(annotation) if isinstance(leaf, type) and issubclass(leaf, BaseModel)]


def repeats(annotation: Any) -> bool:
    """Says whether a key takes one text or several, so that its flag may be given again; commas do not divide it."""
    return str in _leaves(annotation) and _is_list(annotation)


def _is_list(annotation: Any) -> bool:
    return any((get_origin(leaf) or leaf) in _LISTS for leaf in _leaves(annotation))
