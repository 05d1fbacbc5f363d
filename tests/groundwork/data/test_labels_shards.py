"""Claims about labeled shards: ours, those of others, remote ones, and the drawn scenes."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groundwork.data import foreign_shards
from groundwork.data import labels as labels_module
from groundwork.data.annotations import Annotations
from groundwork.data.label_shards import parse_json, to_json
from groundwork.data.label_table import HeldOut
from groundwork.data.labels import LabeledSamples, has_split, open_labeled, splits_of
from groundwork.data.remote import open_remote
from groundwork.data.shard_index import SampleIndex, index_shard, samples_name
from groundwork.data.shard_sets import open_shards
from groundwork.data.write_shards import write_shards
from groundwork.errors import DataError
from tests.groundwork.data.web import serving

MakeJpeg = Callable[..., bytes]


def member(*boxes: tuple[float, float, float, float], number: int = 0, name: str = "x") -> bytes:
    count = len(boxes)
    document = {"boxes": list(boxes), "classes": [number] * count, "names": [name] * count}
    return json.dumps(document).encode()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def open_(data: Path | str, split: str | None, cache: Path, **more: Any) -> LabeledSamples:
    return open_labeled(str(data), split, cache=cache, cache_bytes=1 << 24, **more)


def all_boxes(samples: LabeledSamples) -> dict[str, list[list[float]]]:
    places = [(s, i) for s, size in enumerate(samples.shard_sizes.tolist()) for i in range(size)]
    looked = [samples.look(*place) for place in places]
    return {sample.key: found.boxes.tolist() for sample, _, found in looked}


def write_own(folder: Path, make_jpeg: MakeJpeg, count: int = 5) -> Path:
    samples = []
    for i in range(count):
        labels = member((i, 2, 30, 40), number=i % 2, name="ab"[i % 2])
        samples.append((f"p.{i}", {"jpg": make_jpeg(i), "json": labels}))
    return write_shards(folder, samples, shard_size=2, classes=["a", "b"])


# ---- the member and the index ------------------------------------------------------------------


def test_the_member_comes_back_as_it_was_written() -> None:
    found = Annotations.of([[1.5, 2, 3, 4.25], [0, 0, 9, 9]], [1, 0], [False, True])
    labels = parse_json(to_json(found, ["a", "b"]), "f", 2)
    assert labels.boxes.tolist() == [[1.5, 2, 3, 4.25], [0, 0, 9, 9]]
    assert labels.classes.tolist() == [1, 0] and labels.crowd.tolist() == [False, True]
    empty = to_json(Annotations.of([], []), ["a"])
    assert json.loads(empty) == {"boxes": [], "classes": [], "names": []}
    assert parse_json(empty, "f", 1).boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", "f, line 1: this is no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[]", "has no boxes and classes"),
        (b'{"label": 3}', "has no boxes and classes"),
        (b'{"boxes": [[1, 2, 3]], "classes": [0]}', "not of the form"),
        (b'{"boxes": [[1, 2, 3, null]], "classes": [0]}', "not of the form"),
        (b'{"boxes": [[1, 2, 3, 4]], "classes": []}', "not of the form"),
        (b'{"boxes": [[1, 2, 3, 4]], "classes": ["a"]}', "not of the form"),
        (b'{"boxes": [[1, 2, 3, 4]], "classes": [true]}', "not of the form"),
        (b'{"boxes": [[1, 2, 3, 4]], "classes": [2]}', "box 1 has the class 2"),
        (b'{"boxes": [[1, 2, 3, 4]], "classes": [-1]}', "box 1 has the class -1"),
    ],
)
def test_a_member_of_another_form_is_refused(content: bytes, match: str) -> None:
    with pytest.raises(DataError, match=match):
        parse_json(content, "f", 2)


def test_the_index_knows_where_members_lie_whatever_their_order(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    samples = [
        ("a", {"json": b'{"a":1}', "jpg": make_jpeg(0)}),
        ("b", {"jpg": make_jpeg(1)}),
        ("c", {"jpg": make_jpeg(2), "cls": b"1", "json": b'{"c":1}'}),
    ]
    folder = write_shards(tmp_path / "set", samples)
    shards = open_shards(folder, tmp_path)
    found = [shards.read_json(0, index) for index in range(3)]
    assert found == [b'{"a":1}', None, b'{"c":1}']
    foreign, _ = index_shard(folder / "shard-000000.tar", lambda _: b"1")
    own = shards.samples(0)
    assert foreign.json_offsets is not None and own.json_offsets is not None
    assert foreign.json_offsets.tolist() == own.json_offsets.tolist()
    assert SampleIndex.parse(own.dump(), "x").dump() == own.dump()


def test_an_index_without_members_has_the_bytes_that_it_always_had() -> None:
    one = np.ones(1, np.int64)
    index = SampleIndex(["a"], ["a.jpg"], 512 * one, 9 * one, [None], 1024)
    assert index.dump() == (
        b'{"format":"groundwork-samples","version":1,"bytes":1024,"sha256":"","plan":"",'
        b'"quarantined":[],"paths":["a.jpg"],"offsets":[512],"sizes":[9]}\n'
    )
    assert SampleIndex.parse(index.dump(), "x").json_offsets is None


def test_an_index_whose_members_lie_outside_the_tar_is_damaged() -> None:
    one = np.ones(1, np.int64)
    index = SampleIndex(["a"], ["a.jpg"], 512 * one, 9 * one, [None], 1024)
    index.json_offsets, index.json_sizes = 1000 * one, 30 * one
    with pytest.raises(DataError, match="damaged"):
        SampleIndex.parse(index.dump(), "x")
    index.json_offsets, index.json_sizes = np.ones(2, np.int64), np.ones(2, np.int64)
    with pytest.raises(DataError, match="damaged"):
        SampleIndex.parse(index.dump(), "x")


# ---- ours --------------------------------------------------------------------------------------


def test_shards_of_ours_are_labeled_data(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    folder = write_own(tmp_path / "set", make_jpeg)
    samples = open_(folder, "train", tmp_path)
    assert samples.names == ("a", "b") and samples.splits == ()
    assert all_boxes(samples) == {f"p.{i}": [[i, 2, 30, 40]] for i in range(5)}
    assert samples.look(0, 1)[2].classes.tolist() == [1]
    copy = pickle.loads(pickle.dumps(samples))
    assert all_boxes(copy) == all_boxes(samples)
    one = open_(folder / "shard-000001.tar", None, tmp_path)
    assert list(all_boxes(one)) == ["p.2", "p.3"]
    assert list(all_boxes(open_(f"{folder}/*.tar", None, tmp_path))) == list(all_boxes(samples))


def test_folders_of_shards_are_splits(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    for split, count in (("train", 4), ("val", 2)):
        write_own(tmp_path / "set" / split, make_jpeg, count)
    assert splits_of(str(tmp_path / "set")) == ("train", "val")
    assert has_split(str(tmp_path / "set"), "val")
    sizes = [len(open_(tmp_path / "set", split, tmp_path)) for split in ("train", "val", None)]
    assert sizes == [4, 2, 6]
    samples = [("p", {"jpg": make_jpeg(0), "json": member((1, 1, 2, 2), name="z")})]
    write_shards(tmp_path / "set" / "test", samples, classes=["z"])
    with pytest.raises(DataError, match=r"class 0 is 'a' and, .*'z'"):
        open_(tmp_path / "set", "train", tmp_path)


def test_folders_of_shards_are_known_by_what_exporters_call_splits(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    root = tmp_path / "set"
    for split, count in (("train", 4), ("valid", 2), ("pictures", 1)):
        write_own(root / split, make_jpeg, count)
    assert splits_of(str(root)) == ("train", "val")
    assert len(open_(root, "val", tmp_path)) == 2
    write_own(root / "val", make_jpeg, 1)
    with pytest.raises(DataError, match="two folders of shards for val, val and valid"):
        splits_of(str(root))


def test_a_list_keeps_samples_and_leaves_shards_empty(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    folder = write_own(tmp_path / "set", make_jpeg)
    names = tmp_path / "names.txt"
    names.write_text("p.4.jpg\np.1\n")
    samples = open_(folder, None, tmp_path, names_in=names)
    assert samples.shard_sizes.tolist() == [1, 0, 1] and len(samples) == 2
    assert list(all_boxes(samples)) == ["p.1", "p.4"]
    assert samples.fingerprint != open_(folder, None, tmp_path).fingerprint


def test_a_part_of_shards_is_held_out(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    folder = write_own(tmp_path / "set", make_jpeg)
    whole = open_(folder, None, tmp_path)
    held, rest = (open_(folder, None, tmp_path, held_out=HeldOut(0.4, k)) for k in (True, False))
    assert len(held) == round(0.4 * len(whole)) and len(held) + len(rest) == len(whole)
    assert {*all_boxes(held), *all_boxes(rest)} == {*all_boxes(whole)}
    assert len({one.fingerprint for one in (whole, held, rest)}) == 3


def test_shards_without_labels_are_told_of_as_such(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    plain = write_shards(tmp_path / "plain", [("a", {"jpg": make_jpeg(0)})])
    with pytest.raises(DataError, match=r"has no a\.json beside the picture"):
        open_(plain, None, tmp_path)
    other = [("a", {"jpg": make_jpeg(0), "json": b'{"caption": "a plane"}'})]
    with pytest.raises(DataError, match="has no boxes and classes"):
        open_(write_shards(tmp_path / "captions", other), None, tmp_path)


# ---- those of others ---------------------------------------------------------------------------


def test_shards_of_others_are_labeled_data_and_their_names_put_together(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    members = [
        ("a.jpg", make_jpeg(0)),
        ("a.json", member((1, 1, 5, 5), number=2, name="plane")),
        ("b.json", member((1, 1, 5, 100), (2, 2, 3, 3), name="car")),
        ("b.jpg", make_jpeg(1)),
    ]
    write_tar(tmp_path / "theirs" / "x.tar", members)
    (tmp_path / "theirs" / "sizes.json").write_text('{"x.tar": 2}')  # as tools write them
    samples = open_(tmp_path / "theirs", "train", tmp_path)
    assert samples.names == ("car", "class_1", "plane")
    assert all_boxes(samples) == {"a": [[1, 1, 5, 5]], "b": [[1, 1, 5, 48], [2, 2, 3, 3]]}
    assert len(samples.defects) == 1


def test_what_is_wrong_in_shards_of_others_shows_when_they_are_opened(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    good = [("a.jpg", make_jpeg(0)), ("a.json", member((1, 1, 5, 5)))]
    for name, last, match in (
        ("none", [("b.jpg", make_jpeg(1))], r"has no b\.json"),
        ("minus", [("b.jpg", make_jpeg(1)), ("b.json", member((1, 1, 2, 2), number=-1))], "-1"),
        ("other", [("b.jpg", make_jpeg(1)), ("b.json", member((1, 1, 2, 2), name="y"))], "'y'"),
    ):
        write_tar(tmp_path / name / "x.tar", [*good, *last])
        with pytest.raises(DataError, match=match):
            open_(tmp_path / name, None, tmp_path)


def test_an_index_made_before_members_were_known_is_made_again(
    tmp_path: Path, make_jpeg: MakeJpeg, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [("a.jpg", make_jpeg(0)), ("a.json", member((1, 1, 5, 5)))]
    write_tar(tmp_path / "theirs" / "x.tar", members)

    def old(*arguments: Any, **more: Any) -> tuple[SampleIndex, int]:
        index, passed_over = index_shard(*arguments, **more)
        index.json_offsets = index.json_sizes = None
        return index, passed_over

    with monkeypatch.context() as patch:
        patch.setattr(foreign_shards, "_FORM", "1")
        patch.setattr(foreign_shards, "index_shard", old)
        assert open_shards(tmp_path / "theirs", tmp_path).read_json(0, 0) is None
    assert all_boxes(open_(tmp_path / "theirs", None, tmp_path)) == {"a": [[1, 1, 5, 5]]}


# ---- remote ------------------------------------------------------------------------------------


def test_remote_shards_are_labeled_data(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    own = write_own(tmp_path / "www" / "own", make_jpeg)
    write_tar(
        tmp_path / "www" / "theirs" / "x.tar",
        [("a.jpg", make_jpeg(0)), ("a.json", member((1, 1, 5, 5), name="plane"))],
    )
    names = tmp_path / "names.txt"
    names.write_text("p.3.jpg\n")
    with serving(tmp_path / "www") as server:
        samples = open_(f"{server.url}/own", "train", tmp_path / "cache")
        assert samples.names == ("a", "b")
        assert all_boxes(samples) == all_boxes(open_(own, None, tmp_path))
        chosen = open_(f"{server.url}/own", None, tmp_path / "cache", names_in=names)
        assert list(all_boxes(chosen)) == ["p.3"]
        theirs = open_(f"{server.url}/theirs/x.tar", "train", tmp_path / "cache")
        assert theirs.names == ("plane",) and all_boxes(theirs) == {"a": [[1, 1, 5, 5]]}
        for opened in (samples, chosen, theirs):
            opened.close()


@pytest.mark.parametrize("far", [False, True])
def test_labels_that_are_cut_off_are_told_and_not_read_as_less(
    far: bool, tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    own = write_own(tmp_path / "www" / "own", make_jpeg)
    with serving(tmp_path / "www") as server:
        place, cache = f"{server.url}/own" if far else str(own), tmp_path / "cache"
        with closing(
            open_remote([place], cache=cache, cache_bytes=10**9) if far else open_shards(own, cache)
        ) as shards:
            index = shards.samples(0)
            assert index.json_offsets is not None and shards.read_json(0, 0)
            tars = list(cache.rglob("*.tar")) if far else [own / "shard-000000.tar"]
            os.truncate(tars[0], int(index.json_offsets[0]) + 5)
            with pytest.raises(DataError, match=rf"ends inside the sample '{index.keys[0]}.json'"):
                shards.read_json(0, 0)


# ---- drawn scenes ------------------------------------------------------------------------------


def test_drawn_scenes_have_splits_that_share_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from groundwork.data import label_shard_sets, scenes

    monkeypatch.setattr(
        label_shard_sets, "open_scenes", lambda cache: scenes.open_scenes(cache, count=32, size=64)
    )
    assert labels_module.splits_of("scenes") == ("train", "val", "test")
    keys = []
    for split, count in (("train", 28), ("val", 2), ("test", 2)):
        samples = open_("scenes", split, tmp_path)
        assert len(samples) == count and samples.names == scenes.CLASSES
        keys += list(all_boxes(samples))
        assert not len(samples.defects)
    assert keys == [f"scene-{number:06d}" for number in range(32)]
    assert len(open_("scenes", None, tmp_path)) == 32


def test_scenes_kept_by_an_earlier_version_are_drawn_again(tmp_path: Path) -> None:
    from groundwork.data import scene_drawing, scenes

    samples = [("scene-000000", {"jpg": b"old", "json": b"{}"})]
    write_shards(tmp_path / f"scenes-v{scene_drawing.VERSION}-seed0-1x64px", samples)
    shards = scenes.open_scenes(tmp_path, count=1, size=64)
    assert shards.read(0, 0).image != b"old"
    assert shards.samples(0).json_offsets is not None
    assert shards.sets[0].index.classes == list(scenes.CLASSES)
    assert (shards.sets[0].folder / samples_name("scenes-000000.tar")).is_file()
