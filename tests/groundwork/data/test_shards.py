"""Claims about reading shards, ours and those of others, and about the names in them."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from groundwork.data.shard_index import INDEX_NAME, SetIndex, default_key, split_member
from groundwork.data.shard_sets import open_shards
from groundwork.data.tar_format import Member, escape_key, member_header, scan, unescape_key
from groundwork.data.write_shards import write_shards
from groundwork.errors import DataError, UnavailableError


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT
) -> Path:
    """Write a tar as anybody's program would."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_set(folder: Path, count: int = 7, shard_size: int = 3) -> Path:
    return write_shards(
        folder,
        [(f"a.b/x.{i}", {"jpg": bytes([i]) * (100 + i), "cls": b"c%d" % i}) for i in range(count)],
        shard_size=shard_size,
    )


# ---- our own -----------------------------------------------------------------------------------


def test_samples_come_back_in_order_from_any_position(tmp_path: Path) -> None:
    shards = open_shards(write_set(tmp_path / "set"), tmp_path / "cache")
    assert shards.shard_sizes.tolist() == [3, 3, 1]
    assert len(shards) == 7
    for number in (6, 0, 3, 5, 1, 4, 2):
        sample = shards.read(*divmod(number, 3))
        assert (sample.key, sample.label) == (f"a.b/x.{number}", f"c{number}")
        assert sample.image == bytes([number]) * (100 + number)
        with Path(sample.source).open("rb") as file:
            file.seek(sample.offset)
            assert file.read(len(sample.image)) == sample.image
    with pytest.raises(IndexError):
        shards.read(2, 1)
    with pytest.raises(IndexError):
        shards.read(3, 0)
    shards.close()


def test_a_copy_in_another_process_or_a_pickle_reads_the_same(tmp_path: Path) -> None:
    shards = open_shards(write_set(tmp_path / "set"), tmp_path / "cache")
    expected = shards.read(1, 2)
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.read(1, 2) == expected
    assert copy.fingerprint == shards.fingerprint


def test_open_files_stay_few(tmp_path: Path) -> None:
    shards = open_shards(write_set(tmp_path / "set", 120, 1), tmp_path / "cache")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(2):
        for shard in range(120):
            assert shards.read(shard, 0).key == f"a.b/x.{shard}"
    assert len(os.listdir("/proc/self/fd")) - before <= 40  # noqa: PTH208
    shards.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_the_fingerprint_tells_contents_and_order_apart(tmp_path: Path) -> None:
    first = open_shards(write_set(tmp_path / "a"), tmp_path)
    same = open_shards(write_set(tmp_path / "b"), tmp_path)
    other = open_shards(write_set(tmp_path / "c", 6), tmp_path)
    names = [str(tmp_path / "a" / f"shard-{i:06d}.tar") for i in (1, 0, 2)]
    turned = open_shards(names, tmp_path)
    assert first.fingerprint == same.fingerprint
    assert len({s.fingerprint for s in (first, other, turned)}) == 3
    assert turned.read(0, 0).key == "a.b/x.3"


def test_globs_braces_lists_and_folders_find_the_same_shards(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    forms: list[str | list[str]] = [
        str(folder),
        f"{folder}/*.tar",
        f"{folder}/shard-{{000000..000002}}.tar",
        sorted(map(str, folder.glob("*.tar"))),
        str(tmp_path),
    ]
    keys = []
    for form in forms:
        shards = open_shards(form, tmp_path / "cache")
        keys.append([shards.read(i // 3, i % 3).key for i in range(7)])
    assert all(found == [f"a.b/x.{i}" for i in range(7)] for found in keys)
    assert len(open_shards(str(folder / "shard-000001.tar"), tmp_path)) == 3


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    with pytest.raises(DataError, match="No shard found"):
        open_shards(str(tmp_path / "nothing-*.tar"), tmp_path)
    with pytest.raises(DataError, match="not in its folder"):
        open_shards(f"{folder}/shard-{{000000..000003}}.tar", tmp_path)
    with pytest.raises(DataError, match="twice"):
        open_shards([str(folder), str(folder)], tmp_path)
    with pytest.raises(DataError, match="not run"):
        open_shards(f"pipe:touch {tmp_path}/marker", tmp_path)
    assert not (tmp_path / "marker").exists()


def test_a_missing_or_an_extra_shard_is_noticed_at_the_start(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    shard = folder / "shard-000001.tar"
    (folder / "shard-000009.tar").write_bytes(shard.read_bytes())
    with pytest.raises(DataError, match=r"does not name.*shard-000009"):
        open_shards(folder, tmp_path)
    (folder / "shard-000009.tar").unlink()
    shard.unlink()
    with pytest.raises(DataError, match=r"lacks 1 shards.*shard-000001.*verify"):
        open_shards(folder, tmp_path)


@pytest.mark.parametrize("damage", ["gone", "empty", "flipped"])
def test_a_set_without_its_index_is_not_read_as_a_smaller_one(tmp_path: Path, damage: str) -> None:
    folder = write_set(tmp_path / "set")
    index = folder / "index.json"
    content = bytearray(index.read_bytes())
    content[5] ^= 1
    index.write_bytes(content if damage == "flipped" else b"")
    if damage == "gone":
        index.unlink()
    next(folder.glob("*.tar")).unlink()
    with pytest.raises(DataError, match=r"their index\.json is not there or damaged.*verify"):
        open_shards(folder, tmp_path / "cache")
    for samples in folder.glob("*.samples.json"):
        samples.unlink()
    assert len(open_shards(folder, tmp_path / "cache")) == 4


def test_patterns_over_folders_open_them_and_over_pictures_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_set(tmp_path / "sets" / name)
    cache = tmp_path / "cache"
    for pattern in ("sets/*", "sets/{a,b}"):
        assert len(open_shards(str(tmp_path / pattern), cache)) == 14
    (tmp_path / "sets" / "c.jpg").write_bytes(b"no tar")
    with pytest.raises(DataError, match=r"matches .*c\.jpg, which is a picture and no tar"):
        open_shards(str(tmp_path / "sets" / "*"), cache)


def test_a_shard_cut_off_later_is_named_and_the_others_still_read(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    shards = open_shards(folder, tmp_path)
    shard = folder / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(DataError, match=r"shard-000001.tar has 700 bytes.*verify"):
        shards.read(1, 0)
    assert shards.read(2, 0).key == "a.b/x.6"
    opened = folder / "shard-000002.tar"
    os.truncate(opened, 600)
    with pytest.raises(DataError, match=r"shard-000002.tar ends inside the sample 'a.b/x.6'"):
        shards.read(2, 0)


def test_any_changed_byte_of_an_index_is_noticed(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    index = folder / INDEX_NAME
    content = index.read_bytes()
    for position in range(30, len(content) - 1, 7):
        changed = bytearray(content)
        changed[position] ^= 1
        try:
            parsed = SetIndex.parse(bytes(changed), "index.json")
        except DataError:
            continue
        # The one field outside the fingerprint: what pack was asked for.
        assert parsed.plan != SetIndex.parse(content, "x").plan
    samples = folder / "shard-000000.samples.json"
    samples.write_bytes(samples.read_bytes().replace(b"x.1", b"x.9"))
    with pytest.raises(DataError, match="not the one"):
        open_shards(folder, tmp_path).read(0, 0)


@pytest.mark.parametrize("name", ["../evil.tar", "/etc/evil.tar", "a/../../evil.tar"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    one = np.ones(1, dtype=np.int64)
    index = SetIndex([name], one, one, ["0"], ["0"])
    with pytest.raises(DataError, match="outside its folder"):
        SetIndex.parse(index.dump(), "index.json")


def test_a_set_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken() -> Iterable[tuple[str, dict[str, bytes]]]:
        yield "a", {"jpg": b"1"}
        raise RuntimeError("the drawing failed")

    with pytest.raises(RuntimeError):
        write_shards(tmp_path / "set", broken(), shard_size=1)
    assert list(tmp_path.iterdir()) == []
    write_set(tmp_path / "set")
    with pytest.raises(DataError, match="exists already"):
        write_set(tmp_path / "set")


@pytest.mark.parametrize("key", ["", "/a", "../a", "a/../b", "a//b", "a/", ".", "a\x00b"])
def test_a_key_cannot_lead_out_of_a_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError):
        write_shards(tmp_path / "set", [(key, {"jpg": b"1"})])


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    a, b = write_set(tmp_path / "a"), write_set(tmp_path / "b")
    assert all((b / file.name).read_bytes() == file.read_bytes() for file in a.iterdir())


def test_the_index_of_20_000_shards_is_read_quickly(tmp_path: Path) -> None:
    count = 20_000
    hashes = [f"{i:064x}" for i in range(count)]
    names = [f"shard-{i:06d}.tar" for i in range(count)]
    numbers = np.arange(count, dtype=np.int64)
    content = SetIndex(names, numbers, numbers, hashes, hashes).dump()
    started = time.process_time()
    index = SetIndex.parse(content, "index.json")
    assert time.process_time() - started < 0.4  # 0.03 s on an idle core
    assert index.names[-1] == names[-1]


# ---- names -------------------------------------------------------------------------------------

PARTS = st.text(st.characters(exclude_characters="/\x00", exclude_categories=["Cs"]), min_size=1)


@given(st.lists(PARTS, min_size=1, max_size=4).map("/".join))
def test_every_name_round_trips_and_webdataset_finds_its_key(key: str) -> None:
    if any(part in (".", "..") for part in key.split("/")):
        with pytest.raises(DataError):
            escape_key(key)
        return
    escaped = escape_key(key)
    assert unescape_key(escaped) == key
    # Both webdataset's rule as we apply it to others' shards, and its own code.
    assert split_member(f"{escaped}.jpg") == (escaped, "jpg")
    assert base_plus_ext(f"{escaped}.jpg") == (escaped, "jpg")


@given(st.lists(PARTS, min_size=1, max_size=4).map("/".join))
def test_names_survive_the_tar_header(name: str) -> None:
    content = member_header(name, 0) + bytes(1024)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        # tarfile drops slashes at the end, which no picture has.
        assert tar.getnames() == [name.rstrip("/")] or name.endswith("/")


def test_bytes_that_are_no_utf_8_round_trip() -> None:
    name = os.fsdecode(b"caf\xe9/\xff.x")
    assert escape_key(name).isascii()
    assert unescape_key(escape_key(name)) == name


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("a/photo_jpg.rf.001.jpg", "a/photo_jpg.rf.001"),
        ("a.b/c.png", "a.b/c"),
        ("a/.hidden.jpg", "a/.hidden"),
        ("a/.jpg", "a/.jpg"),
        ("..jpg", "..jpg"),
        ("...jpg", "...jpg"),
    ],
)
def test_a_key_is_the_path_less_its_last_extension(path: str, key: str) -> None:
    assert default_key(path) == key


# ---- shards of others --------------------------------------------------------------------------


def test_shards_of_others_are_indexed_once_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    long = "d/" * 60 + "n" * 120
    write_tar(
        folder / "a.tar",
        [
            ("x.jpg", b"one"),
            ("x.cls", b"7\n"),
            ("x.json", b"{}"),
            (f"{long}.JPEG", b"two"),
            ("\N{SNOWMAN}.png", b""),
            ("README.md", b"passed over"),
            ("noext", b"passed over"),
        ],
    )
    write_tar(folder / "b.tar", [(f"{long}.png", b"three")], tarfile.PAX_FORMAT)
    for _ in range(2):
        shards = open_shards(folder, tmp_path / "cache")
        assert shards.shard_sizes.tolist() == [3, 1]
        samples = [shards.read(*place) for place in ((0, 0), (0, 1), (0, 2), (1, 0))]
        assert [s.key for s in samples] == ["x", long, "\N{SNOWMAN}", long]
        assert [s.image for s in samples] == [b"one", b"two", b"", b"three"]
        assert [s.label for s in samples] == ["7", None, None, None]
    assert not (tmp_path / "cache").exists()
    homes = list((folder / ".groundwork-index").iterdir())
    assert len(homes) == 1
    # A shard that changed is indexed again.
    write_tar(folder / "b.tar", [("y.png", b"y"), ("z.png", b"z")])
    assert open_shards(folder, tmp_path / "cache").shard_sizes.tolist() == [3, 2]


def test_a_folder_that_cannot_be_written_to_is_indexed_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_tar(folder / "a.tar", [("x.jpg", b"one")])
    make = Path.mkdir

    def refuse(
        self: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False
    ) -> None:
        if folder in self.parents:
            raise OSError(30, "Read-only file system")
        make(self, mode, parents, exist_ok)

    monkeypatch.setattr(Path, "mkdir", refuse)
    for _ in range(2):
        assert open_shards(folder, tmp_path / "cache").read(0, 0).image == b"one"
    assert [entry.name for entry in folder.iterdir()] == ["a.tar"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.jpg", "a.png"], r"'a.jpg' and 'a.png'"),
        (["p_jpg.rf.1.jpg", "p_jpg.rf.2.jpg"], r"'p_jpg.rf.1.jpg' and 'p_jpg.rf.2.jpg'"),
        (["a.jpg", "a.jpg"], r"'a.jpg' and 'a.jpg'"),
        (["a.jpg", "b.jpg", "a.json", "b.json"], r"'a.jpg' and 'a.json'"),
        (["a.jpg", "b.jpg", "a.jpg"], r"'a.jpg' and 'a.jpg'"),
        (["a.jpg", "b.json"], r"'b.json' but no picture"),
        (["a.jpg", "a.pyd"], "pickle"),
        (["../../evil.jpg"], "leads out"),
        (["/etc/evil.jpg"], "leads out"),
    ],
)
def test_members_that_do_not_make_samples_are_named(
    tmp_path: Path, names: list[str], said: str
) -> None:
    path = write_tar(tmp_path / "a.tar", [(name, b"x") for name in names])
    with pytest.raises(DataError, match=said) as caught:
        open_shards(path, tmp_path / "cache")
    assert "a.tar" in str(caught.value)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["set", "a" * 90 + "/" + "b" * 90])
def test_a_hard_link_is_the_picture_that_it_names(tmp_path: Path, form: int, folder: str) -> None:
    place = tmp_path / folder
    place.mkdir(parents=True)
    (place / "a.jpg").write_bytes(b"first")
    (place / "b.jpg").hardlink_to(place / "a.jpg")
    (place / "c.jpg").write_bytes(b"third")
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            tar.add(place / name, f"{folder}/{name}")
    shards = open_shards(tmp_path / "a.tar", tmp_path / "cache")
    assert [shards.read(0, i).image for i in range(3)] == [b"first", b"first", b"third"]
    assert [shards.read(0, i).key for i in range(3)] == [f"{folder}/{n}" for n in "abc"]


def test_a_download_that_stopped_behind_what_was_reserved_is_damage(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"real"))
    with (tmp_path / "a.tar").open("ab") as file:
        file.write(bytes(2 << 20))
    with pytest.raises(DataError, match=r"damaged at byte 1024.*null bytes to its end"):
        open_shards(tmp_path / "a.tar", tmp_path / "cache")


def test_links_and_pipes_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0
            tar.addfile(info)
        fifo = tarfile.TarInfo("f.jpg")
        fifo.type = tarfile.FIFOTYPE
        tar.addfile(fifo)
        info = tarfile.TarInfo("real.jpg")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"real"))
    shards = open_shards(tmp_path / "a.tar", tmp_path / "cache")
    assert len(shards) == 1
    assert shards.read(0, 0).image == b"real"


def _huge() -> bytes:
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "zero bytes": (lambda good: b"", "empty"),
    "garbage": (lambda good: b"\x9c\x01garbage" * 500, "not a tar"),
    "null blocks": (lambda good: bytes(10240), "no pictures"),
    "gzip": (gzip.compress, "compressed"),
    "cut in data": (lambda good: good[: 2 * 1536 + 600], "cut off"),
    "cut at a header": (lambda good: good[: 2 * 1536], "cut off"),
    "cut in a header": (lambda good: good[: 2 * 1536 + 100], "cut off"),
    "a header's bit": (lambda good: good[:1540] + b"\xff" + good[1541:], "damaged at byte 1536"),
    "a lost block": (lambda good: good[:1536] + bytes(512) + good[2048:], "behind a null block"),
    "1 TB": (lambda good: _huge(), "more than the limit"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_of_others_never_pass_for_shorter_ones(tmp_path: Path, damage: str) -> None:
    good = write_tar(tmp_path / "good.tar", [(f"{i}.jpg", b"p" * 1000) for i in range(4)])
    spoil, said = DAMAGES[damage]
    bad = tmp_path / "bad.tar"
    bad.write_bytes(spoil(good.read_bytes()))
    with pytest.raises(DataError, match=said):
        open_shards(bad, tmp_path / "cache")


def test_the_scan_agrees_with_tarfile(tmp_path: Path) -> None:
    members = [("a/" * n + "é" * n + ".jpg", bytes(n * 97 % 1500)) for n in range(1, 80)]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / "a.tar", members, kind)
        with tarfile.open(path) as tar:
            expected = [Member(m.name, m.offset_data, m.size) for m in tar]
        assert list(scan(path)) == expected


def test_a_shard_that_was_open_while_its_disk_was_gone_is_opened_anew(tmp_path: Path) -> None:
    samples = open_shards(str(write_set(tmp_path / "set")), tmp_path)
    before = samples.read(0, 1)
    opened, place, index = samples._opened[0]
    os.close(opened)
    dead = os.open(tmp_path / "dead", os.O_WRONLY | os.O_CREAT)  # reading it fails
    samples._opened[0] = dead, place, index
    assert samples.read(0, 1) == before
    samples._opened[0] = os.open(tmp_path / "dead", os.O_WRONLY), place, index
    (tmp_path / "set").rename(tmp_path / "gone")
    with pytest.raises(UnavailableError):
        samples.read(0, 1)
    assert 0 not in samples._opened
    (tmp_path / "gone").rename(tmp_path / "set")
    assert samples.read(0, 1) == before
    samples.close()
