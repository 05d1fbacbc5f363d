"""Unreadable pictures are listed once each, and there may not be too many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from groundwork.data.loader import Batch, Replaced
from groundwork.errors import DataError
from groundwork.quarantine import Quarantine


def batch(*keys: str) -> Batch:
    replaced = [Replaced(i, "shard-0.tar", key, 512, "cut short") for i, key in enumerate(keys)]
    return Batch({}, list(keys), list(range(len(keys))), replaced, 0.0)


def test_each_picture_is_listed_once(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, 1000, 0.01)
    quarantine.note(batch("a", "b"))
    quarantine.note(batch("b", "c"))
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["a", "b", "c"]
    assert lines[0]["reason"] == "cut short"
    assert quarantine.bad == 3


@pytest.mark.parametrize(
    ("pictures", "fraction", "allowed"), [(1000, 0.01, 10), (20, 0.01, 1), (1000, 0.0, 0)]
)
def test_more_than_the_allowed_share_ends_the_run(
    tmp_path: Path, pictures: int, fraction: float, allowed: int
) -> None:
    quarantine = Quarantine(tmp_path, pictures, fraction)
    quarantine.note(batch(*map(str, range(allowed))))
    quarantine.check()
    quarantine.note(batch("one more"))
    with pytest.raises(DataError, match=f"{allowed + 1} of {pictures} pictures are unreadable"):
        quarantine.check()


def test_what_ended_a_run_is_counted_anew(tmp_path: Path) -> None:
    ended = Quarantine(tmp_path, 100, 0.01)
    ended.note(batch("a", "b"))
    with pytest.raises(DataError):
        ended.check()
    resumed = Quarantine(tmp_path, 100, 0.01, before=tmp_path)
    resumed.check()
    resumed.note(batch("b"))
    resumed.check()
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1


def test_what_was_bad_before_a_stop_is_known(tmp_path: Path) -> None:
    Quarantine(tmp_path / "a", 1000, 0.01).path.parent.mkdir()
    Quarantine(tmp_path / "a", 1000, 0.01).note(batch("a", "b"))
    path = tmp_path / "a" / "quarantine.jsonl"
    path.write_text(path.read_text() + '{"source": "shard-0')  # cut by a kill
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        resumed = Quarantine(tmp_path / folder, 1000, 0.01, before=tmp_path / "a")
        assert resumed.bad == 2
        resumed.note(batch("b", "c"))
        assert resumed.bad == 3
    lines = (tmp_path / "b" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "b", "c"]
    assert Quarantine(tmp_path / "a", 1000, 0.01).bad == 0  # a new start
    assert not path.exists()
