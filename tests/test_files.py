"""The strict YAML reader and the atomic writer."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archsearch.errors import ConfigError, StorageError
from archsearch.files import MAX_BYTES, Document, parse_yaml, read_yaml, to_json, validate, write_atomic
from archsearch.schema import Frozen, Quantity, parse_quantity


def value(text: str) -> object:
    return parse_yaml(text, "test.yaml").value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 0.001),
        ("3.0e-4", 0.0003),
        ("12:30", "12:30"),
        ("0:1", "0:1"),
        ("017", 17),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("", None),
        ("'1'", "1"),
        ("2026-11-23", "2026-11-23"),
        ("[1, 2.5, a]", [1, 2.5, "a"]),
        ("a: {b: [c]}", {"a": {"b": ["c"]}}),
    ],
)
def test_scalars_are_read_as_meant(text: str, expected: object) -> None:
    assert value(text) == expected
    assert type(value(text)) is type(expected)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("a: 1\na: 2", "test.yaml:2: the key 'a' is repeated"),
        ("a: &x 1\nb: *x", "test.yaml:1: anchors and aliases"),
        ("a: !!python/object:os.system 1", "tag"),
        ("a: .nan", "not a finite number"),
        ("a: nan", "not a finite number"),
        ("a: -.inf", "not a finite number"),
        ("a: 1e999", "not a finite number"),
        ("a: [1", "not valid YAML"),
        ("a: 1\n\tb: 2", "not valid YAML"),
        ("[a]: 1", "not valid YAML|a key must be a word"),
        ("? [a]\n: 1", "a key must be a word"),
        ("--- 1\n--- 2", "more than one document"),
        ("[" * 20_000, "nested deeper"),
    ],
)
def test_what_hides_a_mistake_is_refused(text: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause) as caught:
        value(text)
    assert caught.value.remedy
    assert "\n" not in caught.value.cause


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"\xff\xfea\x00", "not UTF-8"),
        ("a: 1".encode("utf-16"), "not UTF-8"),
        (bytes(range(256)), "not UTF-8"),
        (b"a: \x00", "control characters"),
        (b"a" * (MAX_BYTES + 1), "larger than"),
        (b"x" * 10_000_000, "larger than"),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=cause):
        read_yaml(path)


def test_places_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "loop", tmp_path / "absent", Path("/dev/zero")):
        with pytest.raises(ConfigError):
            read_yaml(path)


def test_byte_order_mark_and_windows_line_ends_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_yaml(path).value == {"a": 1, "b": 2}


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_any_text_gives_a_value_or_one_typed_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_yaml(text, "any")


class Model(Frozen):
    mixers: int
    size: Quantity = 1
    rate: float = 0.0


def document(text: str) -> Document:
    return parse_yaml(text, "space.yaml")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("mixers: 1\nmixrs: 2", "did you mean 'mixers'"),
        ("mixers: x", "space.yaml:1: mixers"),
        ("size: 2", "mixers: Field required"),
        ("", "expected a mapping, found empty"),
        ("[1]", "expected a mapping, found a list"),
        ("mixers: 1\nsize: 3X", "not a number such as"),
    ],
)
def test_validation_names_line_key_and_hint(text: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        validate(Model, document(text))


def test_quantities() -> None:
    assert [parse_quantity(text) for text in ("20M", "1.5B", "64MiB", "7", "3K")] == [
        20_000_000,
        1_500_000_000,
        64 * 2**20,
        7,
        3000,
    ]
    assert validate(Model, document("mixers: 1\nsize: 1e6")).size == 1_000_000


def test_json_refuses_what_json_has_not() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"a": float("nan")})


def test_atomic_write_replaces_or_leaves_alone(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, "one")
    write_atomic(path, "two")
    assert path.read_text() == "two"
    assert [item.name for item in tmp_path.iterdir()] == ["file.json"]
    with pytest.raises(StorageError):
        write_atomic(tmp_path / "absent" / "file.json", "three")
