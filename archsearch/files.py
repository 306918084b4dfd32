"""Reading and writing small files: a strict YAML reader, JSON without NaN, atomic writes.

The reader follows YAML 1.2's core schema, so ``1e-3`` is a number and ``no`` is a word. It refuses
what can hide a mistake or an attack: repeated keys, aliases, tags, deep nesting, large or binary files.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from archsearch.errors import ConfigError, StorageError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 40
_INT = re.compile(r"^[-+]?[0-9]+$")
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_NOT_FINITE = re.compile(r"^([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False, "True": True, "False": False}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Path_ = tuple[str | int, ...]
ModelT = TypeVar("ModelT", bound=BaseModel)


class Document(NamedTuple):
    """A parsed YAML file: its value, its name, and the line (from 1) of each path into the value.

    ``given`` are paths whose values came from elsewhere: the command line or a caller.
    """

    value: Any
    name: str
    lines: dict[Path_, int]
    given: tuple[Path_, ...] = ()

    def where(self, path: Path_) -> str:
        """``file:line`` of the deepest known part of ``path``."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return f"{self.name}:{self.lines[path[:end]]}"
        return self.name


def read_text(path: Path) -> str:
    """The text of a small regular UTF-8 file.

    Raises:
        ConfigError: missing, not a regular file, too large, or not UTF-8 text.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path} is not a regular file", "give the path of a YAML file")
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_BYTES // 1024} KiB", "give a YAML file written by hand")
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text", "save the file as UTF-8") from None
    if any(ord(character) < 32 and character not in "\t\r\n" for character in text):
        raise ConfigError(f"{path} holds control characters", "save the file as plain UTF-8 text") from None
    return text


def read_yaml(path: Path) -> Document:
    """Read one YAML document strictly.

    Raises:
        ConfigError: with ``file:line`` of the offence.
    """
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, name: str) -> Document:
    """Parse one YAML document; ``name`` stands for the file in messages."""
    lines: dict[Path_, int] = {}
    try:
        events = _content(yaml.parse(text, Loader=_LOADER), name)
        first = next(events, None)
        value = None if first is None else _build(first, events, (), lines, name)
        if next(events, None) is not None:
            raise ConfigError(f"{name} holds more than one document", "keep one document a file")
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}: not valid YAML: {problem}", "mend the YAML syntax there") from None
    return Document(value, name, lines)


def _content(events: Iterator[Any], name: str) -> Iterator[Any]:
    """The events that carry content, with everything refused that this reader does not take."""
    depth = 0
    for event in events:
        where = f"{name}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"{where}: anchors and aliases are not allowed", "write the value out")
        if getattr(event, "tag", None) not in (None, "!"):
            raise ConfigError(f"{where}: the tag {event.tag} is not allowed", "remove the tag")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH} levels", "flatten the file")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if isinstance(event, yaml.NodeEvent | yaml.CollectionEndEvent):
            yield event


def _build(event: Any, events: Iterator[Any], path: Path_, lines: dict[Path_, int], name: str) -> Any:
    lines[path] = event.start_mark.line + 1
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event, name)
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Any] = []
        while not isinstance(child := next(events), yaml.SequenceEndEvent):
            items.append(_build(child, events, (*path, len(items)), lines, name))
        return items
    mapping: dict[str, Any] = {}
    while not isinstance(key := next(events), yaml.MappingEndEvent):
        line, word = key.start_mark.line + 1, getattr(key, "value", None)
        if word is None:
            raise ConfigError(f"{name}:{line}: a key must be a word", "use plain words as keys")
        if word in mapping:
            raise ConfigError(f"{name}:{line}: the key {word!r} is repeated", "keep one of them")
        mapping[word] = _build(next(events), events, (*path, word), lines, name)
        lines[(*path, word)] = line
    return mapping


def _scalar(event: Any, name: str) -> Any:
    text: str = event.value
    if not event.implicit[0]:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.match(text) and len(text) <= 40:
        return int(text)
    if _FLOAT.match(text):
        number = float(text)
        if number not in (float("inf"), float("-inf")):
            return number
    if _NOT_FINITE.match(text) or _FLOAT.match(text) or text.lower() == "nan":
        where = f"{name}:{event.start_mark.line + 1}"
        raise ConfigError(f"{where}: {text} is not a finite number", "write a finite number")
    return text


def validate(model: type[ModelT], document: Document, path: Path_ = ()) -> ModelT:
    """Validate a document as ``model``; ``path`` locates the value inside its file.

    Raises:
        ConfigError: the first problem as cause, the number of further ones beside it.
    """
    value = document.value
    for part in path:
        value = value[part]
    if not isinstance(value, dict):
        found = "empty" if value is None else f"a {type(value).__name__}"
        raise ConfigError(f"{document.where(path)}: expected a mapping, found {found}", "see `archsearch init`")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _config_error(error, document, path) from None


def _config_error(error: ValidationError, document: Document, path: Path_) -> ConfigError:
    problems = error.errors(include_url=False)
    first = problems[0]
    location = (*path, *first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    key = ".".join(str(part) for part in first["loc"])
    named = message.partition(":")[0].split(".")  # a check of the whole names the part that is wrong first
    where, remedy = document.where((*location, *named)), f"correct it and run `archsearch validate {document.name}`"
    if given := [path for path in document.given if all(a == b for a, b in zip(path, location, strict=False))]:
        names = ", ".join(dict.fromkeys(".".join(map(str, path)) for path in given))
        inside = any(len(path) <= len(location) for path in given)
        where = f"given {names}" if inside else f"{where} with the given {names}"
        remedy = "correct that value" if inside else "correct that value, or the file"
    cause = f"{where}: {key + ': ' if key else ''}{message}"
    if first["type"] not in ("value_error", "missing") and isinstance(first["input"], str | int | float | bool | None):
        cause += f" (found {first['input']!r})"
    more = f" ({len(problems) - 1} more problems after it)" if len(problems) > 1 else ""
    return ConfigError(cause, remedy + more)


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a crash leaves either the old or the new content, never a part.

    Raises:
        StorageError: the folder cannot be written or the disk is full.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", "free space or choose another folder") from error


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON text of plain data; NaN and infinity are refused with ValueError."""
    return json.dumps(value, allow_nan=False, indent=indent, ensure_ascii=False) + "\n"
