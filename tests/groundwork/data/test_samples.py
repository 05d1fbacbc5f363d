"""What a person names is opened as what it is, or refused in a sentence that helps."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from groundwork.data.decode import Picture
from groundwork.data.loader import Arrays, Loader
from groundwork.data.order import Order
from groundwork.data.samples import FolderSamples, JoinedSamples, PictureFiles, open_samples
from groundwork.data.shard_index import SetIndex
from groundwork.data.shards import Samples, ShardSamples
from groundwork.data.write_shards import write_shards
from groundwork.errors import DataError, UnavailableError, UsageError
from tests.groundwork.data.web import serving

ROOT = Path(__file__).resolve().parents[3]
Make = Callable[..., bytes]


@pytest.fixture
def folder(tmp_path: Path, make_jpeg: Make) -> Path:
    root = tmp_path / "bilder #1"
    names = ["b.jpg", "A.JPG", "ships/x.y.png", "ships/deep/z.TIFF", "Zug/ü 😀.webp", "b/c.jpeg"]
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_jpeg(number))
    for name in ["notes.txt", ".hidden.jpg", "ships/._x.jpg", ".cache/t.jpg", "noext", "jpg"]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no")
    return root


def opened(train: str | list[str], tmp_path: Path) -> Samples:
    return open_samples(train, cache=tmp_path / "cache", cache_bytes=10**9)


def keys(samples: Samples) -> list[str]:
    return [
        samples.read(shard, index).key
        for shard, size in enumerate(samples.shard_sizes.tolist())
        for index in range(size)
    ]


def test_a_folder_is_read_as_it_is_sorted_by_path(
    folder: Path, tmp_path: Path, make_jpeg: Make
) -> None:
    samples = opened(str(folder), tmp_path)
    assert isinstance(samples, FolderSamples)
    assert keys(samples) == ["A", "Zug/ü 😀", "b/c", "b", "ships/deep/z", "ships/x.y"]
    assert samples.shard_sizes.tolist() == [1] * 6
    found = [samples.read(shard, 0) for shard in range(6)]
    assert [sample.label for sample in found] == [None, "Zug", "b", None, "ships", "ships"]
    assert found[5].image == make_jpeg(2)
    assert found[5].source == str(folder / "ships/x.y.png")
    assert found[5].offset == 0


def test_the_fingerprint_tells_paths_sizes_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    first = opened(str(folder), tmp_path).fingerprint
    moved = folder.rename(tmp_path / "moved")
    assert opened(str(moved), tmp_path).fingerprint == first
    picture = moved / "b.jpg"
    picture.write_bytes(picture.read_bytes() + b"\0")
    second = opened(str(moved), tmp_path).fingerprint
    picture.rename(moved / "c.jpg")
    assert len({first, second, opened(str(moved), tmp_path).fingerprint}) == 3


def test_links_are_followed_once_and_circles_end(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "b.jpg").rename(elsewhere / "b.jpg")
    (folder / "one").symlink_to(elsewhere)
    (folder / "two").symlink_to(elsewhere)
    (folder / "circle").symlink_to(folder)
    (folder / "ships/up").symlink_to("..")
    (elsewhere / "back").symlink_to(folder)
    (folder / "picture.jpg").symlink_to(elsewhere / "b.jpg")
    (folder / "gone.jpg").symlink_to(elsewhere / "gone.jpg")
    samples = opened(str(folder), tmp_path)
    expected = ["A", "Zug/ü 😀", "b/c", "gone", "one/b", "picture", "ships/deep/z", "ships/x.y"]
    numbers = [shard for shard in range(len(samples)) if shard != 3]
    assert len(samples) == len(expected)
    assert [samples.read(shard, 0).key for shard in numbers] == expected[:3] + expected[4:]
    with pytest.raises(DataError, match=r"gone\.jpg cannot be read: No such file"):
        samples.read(3, 0)


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_a_link_to_a_folder_around_a_linked_one_is_followed(
    tmp_path: Path, make_jpeg: Make, names: str
) -> None:
    (tmp_path / "x" / "sub").mkdir(parents=True)
    for number, path in enumerate(("x/one.jpg", "x/sub/two.jpg", "x/three.jpg")):
        (tmp_path / path).write_bytes(make_jpeg(number))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / names[0]).symlink_to(tmp_path / "x" / "sub")
    (tmp_path / "set" / names[1]).symlink_to(tmp_path / "x")
    (tmp_path / "set" / "self.jpg").symlink_to("self.jpg")
    samples = opened(str(tmp_path / "set"), tmp_path)
    assert len(samples) == 4
    with pytest.raises(DataError, match=r"self\.jpg cannot be read"):
        samples.read(3, 0)


def test_pictures_and_a_stray_tar_in_one_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(folder / "backup.tar", "w") as tar:
        tar.add(folder / "b.jpg", "b.jpg")
    with pytest.raises(DataError, match=r"pictures .* as well as tar shards .*backup\.tar\)"):
        opened(str(folder), tmp_path)
    (folder / "backup.tar").rename(folder / "ships" / "deep" / "backup.tar")
    with pytest.raises(DataError, match=r"pictures .* as well as tar shards .*backup\.tar\)"):
        opened(str(folder), tmp_path)
    (folder / "ships" / "deep" / "backup.tar").rename(folder / "._backup.tar")  # as macOS leaves
    assert len(opened(str(folder), tmp_path)) == 6


def test_nothing_is_passed_over_where_sets_and_pictures_lie_in_one_tree(
    folder: Path, tmp_path: Path, make_jpeg: Make, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = [(f"{number}", {"jpg": make_jpeg(number)}) for number in range(4)]
    write_shards(folder.parent / "tree" / "set", pictures, shard_size=2)
    tree = tmp_path / "tree"
    assert len(opened(str(tree), tmp_path)) == 4
    folder.rename(tree / "pictures")
    with pytest.raises(DataError, match=r"pictures .* as well as tar shards"):
        opened(str(tree), tmp_path)
    assert len(opened([str(tree / "set"), str(tree / "pictures")], tmp_path)) == 10
    (tree / "pictures").rename(tree / "set" / "more")  # as a run's own pictures may lie there
    assert len(opened(str(tree / "set"), tmp_path)) == 4
    assert "pictures that lie there are passed over" in caplog.text
    write_shards(tree / "set" / "second", pictures, shard_size=2)
    with pytest.raises(DataError, match=r"set is a set of shards, and .*second.* holds more"):
        opened(str(tree / "set"), tmp_path)
    assert len(opened(str(tree / "set" / "*.tar"), tmp_path)) == 4  # these, and no more, are meant


def test_previews_below_anybodys_shards_are_told_of(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    with tarfile.open(hub / "0.tar", "w") as tar:
        tar.add(folder / "b.jpg", "b.jpg")
    folder.rename(hub / "assets")
    assert len(opened(str(hub), tmp_path)) == 1
    assert "passed over" in caplog.text and "A.JPG" in caplog.text


def test_a_list_names_each_picture_once_whatever_tool_wrote_it(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = folder / "list.txt"
    names.write_bytes("\ufeffb.jpg\r\nA.JPG\r\n./b.jpg\r\nA.JPG\r\n".encode())
    samples = opened(str(names), tmp_path)
    assert keys(samples) == ["b", "A"]
    assert "names 2 things more than once" in caplog.text
    other = tmp_path / "other.txt"
    other.write_text(f"{folder / 'ships/x.y.png'}\n")
    with pytest.raises(DataError, match=r"other\.txt, whose .*ships, which .* be there twice"):
        opened([str(other), str(folder)], tmp_path)
    names.write_text("list.txt\n")
    with pytest.raises(DataError, match="names itself"):
        opened(str(names), tmp_path)


def test_a_disk_that_is_not_there_any_more_is_waited_for(folder: Path, tmp_path: Path) -> None:
    samples = opened(str(folder), tmp_path)
    (folder / "A.JPG").unlink()
    with pytest.raises(DataError) as caught:
        samples.read(0, 0)
    assert not isinstance(caught.value, UnavailableError)  # this picture alone
    folder.rename(tmp_path / "unmounted")
    with pytest.raises(UnavailableError, match=r"A\.JPG cannot be read"):
        samples.read(0, 0)
    folder.mkdir()
    with pytest.raises(UnavailableError):
        samples.read(0, 0)


def test_pictures_beside_shards_are_shuffled_like_shards(tmp_path: Path) -> None:
    """As shards of one, 0.4 of the batches had next to nothing but pictures of one tar."""
    for place, count in (("single", 130), ("packed", 120)):
        (tmp_path / place).mkdir()
        for number in range(count):
            (tmp_path / place / f"{number:03d}.jpg").write_bytes(b"%d" % number)
    for first in range(0, 120, 20):
        with tarfile.open(tmp_path / f"shard-{first:03d}.tar", "w") as tar:
            for number in range(first, first + 20):
                tar.add(tmp_path / "packed" / f"{number:03d}.jpg", f"{number:03d}.jpg")
    samples = opened([str(tmp_path / "shard-*.tar"), str(tmp_path / "single")], tmp_path)
    assert samples.shard_sizes.tolist() == [20] * 12 + [10]
    keys = [samples.read(s, i).key for s, n in enumerate(samples.shard_sizes) for i in range(n)]
    assert keys == [f"{n:03d}" for n in (*range(120), *range(130))]
    assert samples.read(12, 9).image == b"129"
    with pytest.raises(IndexError):
        samples.read(12, 10)
    alone = opened(str(tmp_path / "single"), tmp_path)
    assert alone.shard_sizes.tolist() == [1] * 130


def test_a_folder_of_another_that_is_named_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ships, which lies in .* be there twice"):
        opened([str(folder / "ships"), str(folder)], tmp_path)


def test_a_name_that_is_no_unicode_is_read_all_the_same(tmp_path: Path, make_jpeg: Make) -> None:
    path = os.fsencode(tmp_path / "data") + b"/\xff.jpg"
    (tmp_path / "data").mkdir()
    with open(path, "wb") as file:  # noqa: PTH123 (a Path takes no bytes)
        file.write(make_jpeg(1))
    assert opened(str(tmp_path / "data"), tmp_path).read(0, 0).image == make_jpeg(1)


def test_nothing_there_says_what_was_looked_for_and_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist.*python -m pretrain\.pack"):
        opened(str(tmp_path / "nothing"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no picture in .*empty.*jpeg.*python -m pretrain\.pack"):
        opened(str(tmp_path / "empty"), tmp_path)
    (tmp_path / "text.md").touch()
    with pytest.raises(DataError, match="neither a folder"):
        opened(str(tmp_path / "text.md"), tmp_path)
    with pytest.raises(UsageError, match="empty list"):
        opened([], tmp_path)


def test_the_same_place_named_twice_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    for other in (str(folder), f"{folder}/../{folder.name}", str(tmp_path / "link")):
        with pytest.raises(DataError, match="twice: name each of them once"):
            opened([str(folder), other], tmp_path)


@pytest.mark.parametrize("train", ["pipe:touch {}", "exec:touch {}"])
def test_commands_are_never_run(tmp_path: Path, train: str) -> None:
    marker = tmp_path / "marker"
    for given in (train.format(marker), [train.format(marker), str(tmp_path)]):
        with pytest.raises(UsageError, match="never done"):
            opened(given, tmp_path)
    assert not marker.exists()


def test_schemes_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ftp:// cannot be read"):
        opened("ftp://host/set", tmp_path)


@pytest.fixture
def packed(tmp_path: Path, make_jpeg: Make) -> Path:
    pictures = ((f"p{number}", {"jpg": make_jpeg(number)}) for number in range(6))
    return write_shards(tmp_path / "shards", pictures, shard_size=2)


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("", 6),
        ("/index.json", 6),
        ("/*.tar", 6),
        ("/shard-{000000..000001}.tar", 4),
        ("/shard-000002.tar", 2),
    ],
)
def test_shards_are_opened_as_shards(
    packed: Path, tmp_path: Path, tail: str, expected: int
) -> None:
    samples = opened(f"{packed}{tail}", tmp_path)
    assert isinstance(samples, ShardSamples)
    assert len(samples) == expected
    samples.close()


def test_several_are_one_after_the_other(
    packed: Path, folder: Path, tmp_path: Path, make_jpeg: Make
) -> None:
    with (
        serving(packed.parent) as web,
        closing(opened([str(folder), f"{web.url}/shards", str(packed)], tmp_path)) as samples,
    ):
        assert isinstance(samples, JoinedSamples)
        assert samples.shard_sizes.tolist() == [2] * 9  # single pictures as shards of two
        assert len(samples) == 18
        own = [f"p{number}" for number in range(6)]
        assert keys(samples)[6:] == own + own
        assert samples.read(5, 1).image == make_jpeg(5)
        with pytest.raises(IndexError):
            samples.read(9, 0)
        samples.prefetch([0, 4, 8])
    other = opened([str(packed), str(folder)], tmp_path)
    assert other.fingerprint != samples.fingerprint
    other.close()


def test_a_list_of_local_shards_is_one_set(packed: Path, tmp_path: Path) -> None:
    given = [str(packed / "shard-000002.tar"), str(packed / "shard-000000.tar")]
    with closing(opened(given, tmp_path)) as samples:
        assert isinstance(samples, ShardSamples)
        assert keys(samples) == ["p4", "p5", "p0", "p1"]


def test_a_text_file_lists_pictures_folders_and_shards(
    packed: Path, folder: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"{folder.name}/b.jpg\r\n\n{folder}/ships/x.y.png\n")
    samples = opened(str(listed), tmp_path)
    assert isinstance(samples, PictureFiles)
    assert keys(samples) == [f"{folder.name}/b", f"{folder}/ships/x.y"]
    assert [samples.read(shard, 0).label for shard in range(2)] == [folder.name, None]
    listed.write_text(f"{folder.name}/b.jpg\n{packed.name}\n")
    both = opened(str(listed), tmp_path)
    assert keys(both) == [f"{folder.name}/b", *(f"p{number}" for number in range(6))]
    both.close()
    listed.write_text("\n")
    with pytest.raises(DataError, match="names nothing"):
        opened(str(listed), tmp_path)


def test_one_picture_alone_is_a_data_set(folder: Path, tmp_path: Path) -> None:
    assert keys(opened(str(folder / "b.jpg"), tmp_path)) == ["b"]


def test_shards_in_folders_of_their_own_are_found(packed: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    packed.rename(outer / "inner")
    with closing(opened(str(outer), tmp_path)) as samples:
        assert len(samples) == 6


def test_a_folder_and_its_shards_give_the_loader_the_same_pictures(
    folder: Path, tmp_path: Path
) -> None:
    def mean(picture: Picture, generator: np.random.Generator) -> Arrays:
        return {"mean": np.asarray(picture.pixels().mean(), np.float32)}

    samples = opened(str(folder), tmp_path)
    order = Order(samples.shard_sizes, seed=0)
    with closing(Loader(samples, order, mean, seed=0, batch_size=6)) as loader:
        batch = next(iter(loader))
    assert sorted(batch.keys) == sorted(keys(samples))
    assert batch.replaced == []


def test_a_folder_is_small_in_memory(tmp_path: Path) -> None:
    listed = [(f"some/folder/picture-{number:07d}.jpg", number) for number in range(100_000)]
    samples = PictureFiles(tmp_path, iter(listed), "many")
    assert len(samples._joined) + samples._ends.nbytes + samples.shard_sizes.nbytes < 6e6
    assert samples.path(0) == listed[0][0] and samples.path(99_999) == listed[-1][0]


CLAIM = """
    import sys, time
    from pathlib import Path
    import groundwork.data.loader, groundwork.data.samples
    from groundwork.data.order import Order
    from groundwork.data.samples import open_samples
    if __name__ == "__main__":
        def memory(name: str) -> int:
            # Not ru_maxrss, which a process inherits from the one that started it.
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.split(name + ":")[1].split()[0])
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
        start = time.perf_counter()
        samples = open_samples(sys.argv[1], cache=Path(sys.argv[2]), cache_bytes=1 << 40)
        order = Order(samples.shard_sizes, seed=0)
        first = [order[position] for position in range(256)]
        print(len(samples), len(set(first)), time.perf_counter() - start, memory("VmHWM") - before)
"""


def claim(tmp_path: Path, train: str) -> tuple[float, int]:
    program = tmp_path / "claim.py"
    program.write_text(textwrap.dedent(CLAIM))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        [sys.executable, str(program), train, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    samples, first, seconds, added = told.stdout.split()
    assert (int(samples), int(first)) == (100_000_000, 256)
    return float(seconds), int(added)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["here", "far away"])
def test_a_hundred_million_samples_start_in_seconds_and_300_megabytes(
    tmp_path: Path, where: str
) -> None:
    count = 100_000
    folder = tmp_path / "huge"
    folder.mkdir()
    names = [f"shard-{number:06d}.tar" for number in range(count)]
    index = SetIndex(
        names=names,
        pictures=np.full(count, 1000),
        tar_bytes=np.full(count, 150_000_000),
        sha256=[f"{number:064x}" for number in range(count)],
        samples_sha256=[f"{number + count:064x}" for number in range(count)],
    )
    (folder / "index.json").write_bytes(index.dump())
    if where == "here":
        for name in names:  # what lies in them is not looked at before it is read
            os.mknod(folder / name)
        seconds, added = claim(tmp_path, str(folder))
    else:
        with serving(tmp_path) as web:
            seconds, added = claim(tmp_path, f"{web.url}/huge")
    print(f"{where}: {seconds:.2f} s, {added / 1e6:.0f} MB")  # noqa: T201 (a measurement)
    assert seconds < 3  # of the processor
    assert added < 300e6


@pytest.mark.parametrize("given", ["ftp://far/shards", "pipe:cat a.tar", []])
def test_what_is_wrong_is_told_of_the_key_that_named_it(given: str | list[str]) -> None:
    with pytest.raises(UsageError, match=r"probe\.labeled"):
        open_samples(given, cache=Path("cache"), cache_bytes=1, key="probe.labeled")


@pytest.mark.parametrize(
    "lines", [["ships/x.y.png", "{here}/ships/x.y.png"], ["ships", "{here}/ships/"]]
)
def test_a_list_names_a_place_once_however_it_is_written(
    folder: Path, tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = folder / "list.txt"
    names.write_text("".join(f"{line.format(here=folder)}\n" for line in lines))
    once = folder / "once.txt"
    once.write_text(f"{lines[0]}\n")
    assert keys(opened(str(names), tmp_path)) == keys(opened(str(once), tmp_path))
    monkeypatch.chdir(folder)
    assert keys(opened("list.txt", tmp_path)) == keys(opened(str(once), tmp_path))


def test_a_list_of_a_folder_and_of_a_picture_in_it_is_refused(folder: Path, tmp_path: Path) -> None:
    names = folder / "list.txt"
    names.write_text("ships\nb.jpg\nships/deep/z.TIFF\n")
    with pytest.raises(DataError, match=r"names ships/deep/z\.TIFF, which lies in ships, .*twice"):
        opened(str(names), tmp_path)
    names.write_text("ships\nb.jpg\n")
    assert len(opened(str(names), tmp_path)) == 3
