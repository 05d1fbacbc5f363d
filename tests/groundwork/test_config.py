"""A recipe's three layers, and what a person is told about a mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import yaml
from pydantic import Field

from groundwork.config import (
    Section,
    keys_of,
    merge,
    parse_overrides,
    parse_yaml,
    read_yaml,
    to_yaml,
    validate,
)
from groundwork.errors import UsageError


class Inner(Section):
    rate: Annotated[float, Field(gt=0)] = 0.1
    sizes: tuple[int, ...] = (1, 2)


class Outer(Section):
    inner: Inner = Inner()
    name: str = "a"
    count: int = 3


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E5", 1e5), ("-2.5e+2", -250.0), ("7", 7), ("1.5", 1.5), ("e3", "e3")],
)
def test_numbers_are_read_as_people_write_them(text: str, value: object) -> None:
    assert parse_yaml(text, "here") == value


def test_overrides_become_a_nested_dict() -> None:
    values = parse_overrides(["inner.rate=1e-4", "inner.sizes=[3, 4]", "name=b=c", "count=5"])
    assert values == {"inner": {"rate": 1e-4, "sizes": [3, 4]}, "name": "b=c", "count": 5}
    built = validate(Outer, values)
    assert built.inner == Inner(rate=1e-4, sizes=(3, 4))


@pytest.mark.parametrize("argument", ["rate", "=3", "inner..rate=1", ".a=1"])
def test_an_override_that_is_not_key_value_is_refused(argument: str) -> None:
    with pytest.raises(UsageError, match="key=value"):
        parse_overrides([argument])


def test_a_key_below_a_value_is_refused() -> None:
    with pytest.raises(UsageError, match="below name"):
        parse_overrides(["name=a", "name.first=b"])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["inner.rat=1"], "Unknown key inner.rat. Did you mean inner.rate?"),
        (["iner.rate=1"], "Unknown key iner.rate. Did you mean inner.rate?"),
        (["rate=1"], "Unknown key rate. Did you mean inner.rate?"),
        (["inner.rate=-1"], "inner.rate=-1: input should be greater than 0."),
        (["count=many"], "count=many: input should be a valid integer."),
        (["count=1.5"], "count=1.5: input should be a valid integer."),
        (["inner.rate=.inf"], "inner.rate=inf: input should be a finite number."),
        (["inner.sizes=[a]"], "inner.sizes.0=a: input should be a valid integer."),
    ],
)
def test_a_mistake_names_the_full_key_and_what_to_do(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate(Outer, parse_overrides(overrides))
    assert str(caught.value).startswith(sentence)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        validate(Outer, {"count": "x", "nam": 1})
    assert len(str(caught.value).splitlines()) == 2


def test_a_whole_section_is_replaced_by_the_later_layer() -> None:
    merged = merge({"b": {"x": 1}, "c": {"x": 1}}, {"b": {"y": 2}, "c": {"y": 2}}, frozenset("b"))
    assert merged == {"b": {"y": 2}, "c": {"x": 1, "y": 2}}


def test_the_resolved_recipe_can_be_read_again() -> None:
    built = validate(Outer, {"inner": {"rate": 1e-6}, "name": "ünïcode"})
    assert validate(Outer, yaml.safe_load(to_yaml(built))) == built


def test_keys_are_listed_in_full() -> None:
    assert keys_of(Outer) == ["inner", "inner.rate", "inner.sizes", "name", "count"]


def test_a_recipe_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(UsageError, match="keys and values"):
        read_yaml(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_yaml(tmp_path / "missing.yaml")
    path.write_text("a: [1\n")
    with pytest.raises(UsageError, match="not readable YAML"):
        read_yaml(path)
    path.write_text("")
    assert read_yaml(path) == {}


def test_yaml_executes_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    text = f"!!python/object/apply:os.system ['touch {marker}']"
    with pytest.raises(UsageError):
        parse_yaml(text, "here")
    assert not marker.exists()
