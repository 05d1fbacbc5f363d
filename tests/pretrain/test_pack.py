"""Claims about packing pictures."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from groundwork.data.decode import Picture, open_picture
from groundwork.data.reading import Reading
from groundwork.data.shard_sets import open_shards
from groundwork.data.shards import ShardSamples
from groundwork.data.tar_format import unescape_key
from groundwork.errors import DataError
from pretrain import pack_shards
from pretrain.pack import _keys_of, main
from pretrain.recipe import resolve

MakeJpeg = Callable[..., bytes]
ROOT = Path(__file__).resolve().parents[2]

# R17: names that break readers, each a picture of its own.
NAMES = [
    "plain.jpg",
    "photo_jpg.rf.0001.jpg",
    "photo_jpg.rf.0002.jpg",
    "caf\N{LATIN SMALL LETTER E WITH ACUTE}.jpg",
    "cafe\N{COMBINING ACUTE ACCENT}.jpg",
    "\N{SNOWMAN} \N{GRINNING FACE}.jpg",
    "with space.jpg",
    "#hash?query%20%2E%.jpg",
    "new\nline.jpg",
    "case.jpg",
    "Case.jpg",
    ".hidden.jpg",
    ".jpg",
    "{a,b}[0-9]*.jpg",
    "same.jpg",
    "same.jpeg",
    "same.JPG",
    "same.jpg.jpg",
    "n" * 251 + ".jpg",
    "dots.in.folder/a.jpg",
    "new\nline.in/folder.x/a.jpg",
    "__meta__/a.jpg",
    "__x__.jpg",
    "one/same.jpg",
    "two/same.jpg",
    "deep/" * 60 + "a.jpg",
    os.fsdecode(b"latin\xe9.jpg"),
]


def write_pictures(folder: Path, names: list[str], make_jpeg: MakeJpeg) -> dict[str, bytes]:
    contents = {name: make_jpeg(seed) for seed, name in enumerate(names)}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return contents


def run(*arguments: object) -> int:
    return main([str(argument) for argument in (*arguments, "--workers", 1)])


def stored(shards: ShardSamples) -> dict[str, bytes]:
    """Read everything: original path -> bytes."""
    found = {}
    for shard, size in enumerate(shards.shard_sizes.tolist()):
        for index in range(size):
            found[shards.samples(shard).paths[index]] = shards.read(shard, index).image
    return found


# ---- what goes in comes out --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_name_round_trips_here_and_in_plain_webdataset(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    contents = write_pictures(tmp_path / "images", NAMES, make_jpeg)
    assert run(tmp_path / "images", tmp_path / "shards", "--shard-size", 10) == 0
    shards = open_shards(tmp_path / "shards", tmp_path / "cache")
    assert shards.shard_sizes.tolist() == [10, 10, 7]
    assert stored(shards) == contents
    keys = [key for shard in range(3) for key in shards.samples(shard).keys]
    assert len(set(keys)) == len(NAMES)

    import webdataset

    urls = sorted(map(str, (tmp_path / "shards").glob("*.tar")))
    read = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        members = [name for name in sample if not name.startswith("__")]
        assert len(members) == 1
        read[unescape_key(sample["__key__"])] = sample[members[0]]
    assert list(read) == keys
    assert sorted(read.values()) == sorted(contents.values())


def test_pictures_of_one_stem_are_all_kept(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    contents = write_pictures(tmp_path / "images", ["a.jpeg", "a.jpg", "a.jpg.jpg"], make_jpeg)
    assert run(tmp_path / "images", tmp_path / "shards") == 0
    shards = open_shards(tmp_path / "shards", tmp_path)
    assert shards.samples(0).keys == ["a", "a.jpg", "a.jpg.jpg"]
    assert stored(shards) == contents


def test_the_same_path_in_two_inputs_is_two_pictures(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    for name in ("one", "two"):
        write_pictures(tmp_path / name / "train", ["a.jpg"], make_jpeg)
    inputs = [tmp_path / "one" / "train", tmp_path / "two" / "train"]
    assert run(*inputs, tmp_path / "shards") == 0
    shards = open_shards(tmp_path / "shards", tmp_path)
    assert sorted(stored(shards)) == ["one/train/a.jpg", "two/train/a.jpg"]
    assert run(*inputs, inputs[0], tmp_path / "again") == 0
    assert len(open_shards(tmp_path / "again", tmp_path)) == 2


def test_a_list_file_and_links_are_followed(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    contents = write_pictures(tmp_path / "images", ["a b.jpg", "c/d.jpg", "e.jpg"], make_jpeg)
    (tmp_path / "list.txt").write_text(f"images/a b.jpg\n\n{tmp_path}/images/c/d.jpg\r\n")
    assert run(tmp_path / "list.txt", tmp_path / "listed") == 0
    found = stored(open_shards(tmp_path / "listed", tmp_path))
    assert sorted(found) == ["images/a b.jpg", "images/c/d.jpg"]
    # A list of names that climb out of its folder: they are read, and renamed.
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "x.txt").write_text("../images/a b.jpg\n../images/c/d.jpg\n")
    assert run(tmp_path / "lists" / "x.txt", tmp_path / "climbing") == 0
    assert sorted(stored(open_shards(tmp_path / "climbing", tmp_path))) == ["a b.jpg", "c/d.jpg"]

    links = tmp_path / "links"
    links.mkdir()
    (links / "folder").symlink_to(tmp_path / "images")
    (links / "circle").symlink_to(links)
    (links / "file.jpg").symlink_to(tmp_path / "images" / "e.jpg")
    assert run(links, tmp_path / "linked") == 0
    found = stored(open_shards(tmp_path / "linked", tmp_path))
    assert found == {
        "file.jpg": contents["e.jpg"],
        **{f"folder/{name}": content for name, content in contents.items()},
    }


def test_shards_keep_to_both_limits(tmp_path: Path, images: Path) -> None:
    (images / "05.jpg").write_bytes((images / "05.jpg").read_bytes() + bytes(2 << 20))
    assert run(images, tmp_path / "shards", "--shard-size", 4, "--shard-mib", 1) == 0
    shards = open_shards(tmp_path / "shards", tmp_path)
    assert shards.shard_sizes.tolist() == [4, 1, 1, 4]
    assert shards.samples(2).paths == ["05.jpg"]


def test_resize_shrinks_the_shortest_side_and_leaves_small_pictures_alone(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    (tmp_path / "images").mkdir()
    small, exif = make_jpeg(1, 40, 30), Image.Exif()
    exif[274] = 6  # stored lying on its side
    with Image.open(io.BytesIO(make_jpeg(2, 160, 80))) as image:
        image.save(tmp_path / "images" / "large.png", exif=exif)
    (tmp_path / "images" / "small.jpg").write_bytes(small)
    assert run(tmp_path / "images", tmp_path / "shards", "--resize", 32) == 0
    found = stored(open_shards(tmp_path / "shards", tmp_path))
    assert found["small.jpg"] == small
    picture = open_picture(found["large.png"])
    assert (picture.width, picture.height) == (32, 64)
    original = open_picture((tmp_path / "images" / "large.png").read_bytes())
    expected = original.cut([(0, 0, 80, 160)], (64, 32))[0].astype(float)
    assert np.abs(picture.pixels() - expected).mean() < 6  # another turn would give 60 and more


def test_large_pictures_are_cut_into_tiles_that_say_where_they_lie(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    (tmp_path / "images").mkdir()
    small = make_jpeg(1, 64, 48)
    (tmp_path / "images" / "small.jpg").write_bytes(small)
    y, x = np.mgrid[0:64, 0:150]
    scene = np.stack((x, y, 0 * x), 2).astype(np.uint8)
    Image.fromarray(scene).save(tmp_path / "images" / "scene.1.png")
    assert run(tmp_path / "images", tmp_path / "shards", "--tiles", 64, "--overlap", 0.25) == 0
    shards = open_shards(tmp_path / "shards", tmp_path)
    found = stored(shards)
    assert found.pop("small.jpg") == small
    lefts = [0, 43, 86]  # evenly, at least 16 of 64 px in common
    assert sorted(found) == [f"scene.1_x{left}_y0.png" for left in lefts]
    for left in lefts:
        tile = open_picture(found[f"scene.1_x{left}_y0.png"]).pixels().astype(int)
        assert np.abs(tile - scene[:, left : left + 64]).mean() < 4
    again = [str(tmp_path / "images"), str(tmp_path / "shards"), "--tiles", "32", "--workers", "1"]
    assert main(again) == 2  # another packing than the folder's
    assert run(tmp_path / "images", tmp_path / "other", "--tiles", 64, "--resize", 32) == 2


def test_a_picture_named_like_a_tile_of_another_is_refused(
    tmp_path: Path, make_jpeg: MakeJpeg, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "images", ["a/scene.jpg", "a/scene_x0_y64.jpg"], make_jpeg)
    assert run(tmp_path / "images", tmp_path / "shards", "--tiles", 64) == 2
    assert "a/scene_x0_y64.jpg is named like a tile of a/scene" in capsys.readouterr().err
    assert run(tmp_path / "images", tmp_path / "shards") == 0  # nothing is cut
    write_pictures(tmp_path / "others", ["a/scene_x0_y64.jpg"], make_jpeg)
    assert run(tmp_path / "others", tmp_path / "whole", "--tiles", 64) == 0


def test_class_folders_become_labels(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    names = ["ship/a/1.jpg", "plane/2.jpg", "ship/3.jpg", "4.jpg"]
    write_pictures(tmp_path / "images", names, make_jpeg)
    assert run(tmp_path / "images", tmp_path / "shards", "--class-folders") == 0
    shards = open_shards(tmp_path / "shards", tmp_path)
    labels = dict(zip(shards.samples(0).paths, shards.samples(0).labels, strict=True))
    assert labels == dict(zip(names, ["ship", "plane", "ship", None], strict=True))
    assert json.loads((tmp_path / "shards" / "index.json").read_bytes())["classes"] == [
        "plane",
        "ship",
    ]
    # The numbers that webdataset's decoder expects of `cls` are those of index.json.
    tar = (tmp_path / "shards" / "shard-000000.tar").read_bytes()
    assert tar.count(b".cls\x00") == 3


def test_exact_copies_are_dropped_when_asked(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "sub").mkdir()
    (images / "sub" / "copy.jpg").write_bytes((images / "03.jpg").read_bytes())
    assert run(images, tmp_path / "all") == 0
    assert run(images, tmp_path / "shards", "--drop-duplicates") == 0
    assert len(open_shards(tmp_path / "all", tmp_path)) == 11
    assert len(open_shards(tmp_path / "shards", tmp_path)) == 10
    line = json.loads((tmp_path / "shards" / "duplicates.jsonl").read_text())
    assert line == {"path": "sub/copy.jpg", "same_as": "03.jpg"}
    assert "1 exact copies" in capsys.readouterr().out


# ---- what cannot be read -----------------------------------------------------------------------


def test_unreadable_pictures_are_left_out_noted_and_counted(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (images / "00.jpg").read_bytes()
    bad = {
        "cut.jpg": good[: len(good) // 2],
        "empty.png": b"",
        "page.jpg": b"<html>404</html>",
    }
    for name, content in bad.items():
        (images / name).write_bytes(content)
    (images / "dangling.jpg").symlink_to(images / "nowhere")
    (images / "notes.md").write_text("no picture")
    (images / "._00.jpg").write_bytes(b"\x00\x05\x16\x07")
    assert run(images, tmp_path / "shards", "--shard-size", 4) == 0
    lines = (tmp_path / "shards" / "quarantine.jsonl").read_text().splitlines()
    noted = {line["path"]: line["reason"] for line in map(json.loads, lines)}
    assert sorted(noted) == sorted([*bad, "dangling.jpg"])
    assert "empty" in noted["empty.png"]
    shards = open_shards(tmp_path / "shards", tmp_path)
    assert sorted(stored(shards)) == [f"{i:02d}.jpg" for i in range(10)]
    shown = capsys.readouterr().out
    assert "10 pictures" in shown
    assert "4 unreadable" in shown
    assert "1 '.md'" in shown


def test_what_a_missing_package_left_out_is_packed_when_it_is_there(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(data: bytes, reading: object) -> Picture:
        raise DataError("tifffile reads this: pip install tifffile imagecodecs")

    with monkeypatch.context() as changed:
        changed.setattr("pretrain.pack_shards.open_picture", without)
        assert run(images, tmp_path / "shards", "--workers", "1") == 3
    assert run(images, tmp_path / "shards", "--workers", "1") == 0
    assert not (tmp_path / "shards" / "quarantine.jsonl").exists()


def test_a_strip_that_no_jpeg_can_hold_is_left_out(images: Path, tmp_path: Path) -> None:
    Image.new("L", (20000, 40)).save(images / "strip.png")
    assert run(images, tmp_path / "shards", "--resize", "32") == 0
    assert not (tmp_path / "shards" / "quarantine.jsonl").exists()
    Image.new("L", (80000, 33)).save(images / "strip.png")
    assert run(images, tmp_path / "more", "--resize", "32") == 0
    [line] = (tmp_path / "more" / "quarantine.jsonl").read_text().splitlines()
    assert "cannot be encoded as a JPEG" in line and "strip.png" in line


def test_links_to_siblings_pipes_and_shadow_files_are_not_packed(
    images: Path, tmp_path: Path
) -> None:
    assert run(images, tmp_path / "before") == 0
    (images / "__MACOSX").mkdir()
    (images / "__MACOSX" / "._a.jpg").write_bytes(b"shadow")
    (images / "again").symlink_to(images)
    os.mkfifo(images / "pipe.png")
    assert run(images, tmp_path / "after") == 0
    before, after = (open_shards(tmp_path / name, tmp_path) for name in ("before", "after"))
    assert len(before) == len(after)


def test_too_many_unreadable_pictures_are_an_error(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "x.jpg").write_bytes(b"no picture")
    given = (images, tmp_path / "shards", "--max-bad-fraction")
    assert run(*given, 0.05) == 3
    assert "1 of 11 pictures" in capsys.readouterr().err
    with pytest.raises(DataError, match="not finished"):
        open_shards(tmp_path / "shards", tmp_path)
    assert run(*given, 0.1) == 0
    assert "0 shards written now" in capsys.readouterr().out


def test_tiles_do_not_make_bad_scenes_few(
    tmp_path: Path, make_jpeg: MakeJpeg, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    (scenes / "good.jpg").write_bytes(make_jpeg(0, 320, 320))  # 100 tiles
    for number in range(3):
        (scenes / f"bad-{number}.jpg").write_bytes(b"no picture")
    given = (scenes, tmp_path / "shards", "--tiles", 32, "--overlap", 0, "--max-bad-fraction", 0.05)
    assert run(*given) == 3
    assert "3 of 4 pictures cannot be read" in capsys.readouterr().err


def test_a_shard_of_nothing_but_unreadable_pictures_is_left_out(
    tmp_path: Path, images: Path
) -> None:
    for name in ("04.jpg", "05.jpg"):
        (images / name).write_bytes(b"no picture")
    for _ in range(2):
        assert run(images, tmp_path / "shards", "--shard-size", 2) == 0
        assert open_shards(tmp_path / "shards", tmp_path).shard_sizes.tolist() == [2, 2, 2, 2]
        assert run("verify", tmp_path / "shards") == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nowhere", "out"], 2),
        (["setup.cfg", "out"], 2),
        (["empty", "out"], 3),
        (["verify", "nowhere"], 2),
        (["verify", "empty"], 2),
    ],
)
def test_mistakes_have_a_sentence_and_an_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "setup.cfg").touch()
    assert run(*arguments) == code
    assert capsys.readouterr().err.strip().endswith(".")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "required: IMAGES, SHARDS"),
        (["one"], "required: SHARDS"),
        (["a", "b", "--resize", "0"], "--resize: 0 is not 1 or more"),
        (["a", "b", "--overlap", "0.9"], "--overlap: 0.9 is no number between 0 and 0.89"),
        (["a", "--x", "b"], "unrecognized arguments: --x"),
    ],
)
def test_arguments_that_make_no_sense_are_usage_errors(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


# ---- killed and started again ------------------------------------------------------------------


def test_a_stopped_pack_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(images, tmp_path / "whole", "--shard-size", 2) == 0
    folder = tmp_path / "shards"
    entry, calls = pack_shards._entries, 0

    def break_off(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return entry(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pack_shards, "_entries", break_off)
    assert run(images, folder, "--shard-size", 2) == 130
    assert sorted(path.name for path in folder.glob("*.tar*")) == [
        "shard-000000.tar",
        "shard-000001.tar",
    ]
    with pytest.raises(DataError, match="not finished"):
        open_shards(folder, tmp_path)
    (folder / "shard-000002.tar.123.writing").write_bytes(b"left over")
    before = (folder / "shard-000000.tar").stat().st_mtime_ns
    assert run(images, folder, "--shard-size", 2) == 0
    assert (folder / "shard-000000.tar").stat().st_mtime_ns == before
    assert calls == 6 + 6
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


def test_a_folder_of_another_packing_is_refused(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    assert run(images, folder) == 0
    assert run(images, folder) == 0
    assert run(images, folder, "--shard-size", 3) == 2
    assert "another folder" in capsys.readouterr().err
    (images / "00.jpg").write_bytes((images / "01.jpg").read_bytes())
    assert run(images, folder) == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "theirs.tar").write_bytes(b"")
    assert run(images, other) == 2


def test_a_shard_lost_later_is_made_again_alone(tmp_path: Path, images: Path) -> None:
    folder = tmp_path / "shards"
    assert run(images, folder, "--shard-size", 2) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "shard-000003.tar").unlink()
    os.truncate(folder / "shard-000001.tar", 1000)
    assert run("verify", folder) == 3
    assert run(images, folder, "--shard-size", 2) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert run("verify", folder) == 0


@pytest.mark.slow
def test_a_killed_pack_leaves_no_half_shard_and_no_process(
    tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    names = [f"{i:04d}.jpg" for i in range(600)]
    contents = write_pictures(tmp_path / "images", names, make_jpeg)
    folder = tmp_path / "shards"
    command = [sys.executable, "-m", "pretrain.pack", str(tmp_path / "images"), str(folder)]
    command += ["--shard-size", "7", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for target in (3, 25, 60):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, start_new_session=True
        )
        while len(list(folder.glob("*.tar"))) < target:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()  # ends when the workers, who share the pipe, have ended
        with pytest.raises(DataError, match="not finished"):
            open_shards(folder, tmp_path)
        for tar in folder.glob("*.tar"):
            assert run("verify", tar) in (0, 3)
    assert subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode == 0
    assert stored(open_shards(folder, tmp_path)) == contents
    assert not list(folder.glob("*.writing"))
    assert run("verify", folder) == 0


@pytest.mark.slow
def test_any_number_of_processes_makes_the_same_bytes(tmp_path: Path, images: Path) -> None:
    given = [str(images), "--shard-size", "2", "--workers"]
    assert main([given[0], str(tmp_path / "one"), *given[1:], "1"]) == 0
    assert main([given[0], str(tmp_path / "three"), *given[1:], "3"]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "three").iterdir()
    }


@pytest.mark.parametrize(
    ("reading", "kept", "stored"),
    [
        (Reading(), [], []),
        (Reading(bands=(5, 3, 2)), ["data.bands=[5,3,2]"], []),
        (Reading(max_pixels=200_000_000), ["data.max_pixels=200000000"], []),
        (
            Reading(bands=(2, 7), value_range=(0, 4000.5)),
            ["data.bands=[2,7]", "data.value_range=[0,4000.5]"],
            ["data.bands=[1,2]"],
        ),
    ],
)
def test_the_keys_to_train_with_are_told(
    reading: Reading, kept: list[str], stored: list[str]
) -> None:
    assert _keys_of(reading, stored=False) == kept
    assert _keys_of(reading, stored=True) == stored
    for keys in (kept, stored):  # as a recipe takes them
        resolve("simclr", None, ["data.train=there", *keys])


def test_packing_ends_when_too_many_are_bad_whatever_the_others_are(
    tmp_path: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(pack_shards, "_MANY", 3)
    for path in sorted(images.rglob("*.*"))[:9]:
        path.write_bytes(b"no picture")
    given = ["--shard-size", 2, "--max-bad-fraction"]
    assert run(images, tmp_path / "half", *given, 0.5) == 3
    told = capsys.readouterr().err
    assert "6 of 6 pictures cannot be read (4 others were not tried)" in told
    assert len((tmp_path / "half" / "quarantine.jsonl").read_text().splitlines()) == 6
    assert [record.getMessage()[:40] for record in caplog.records] == [
        "None of 4 pictures could be read so far:"
    ]
    assert run(images, tmp_path / "allowed", *given, 0.9) == 0


def test_pictures_that_are_out_of_reach_are_waited_for_and_never_left_out(
    tmp_path: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A network file system that is gone for a while made a smaller set, and said so at the end."""
    whole = stored_after(images, tmp_path / "whole")
    read, calls = Path.read_bytes, [0]
    failing: range = range(2, 5)

    def flaky(self: Path) -> bytes:
        if self.suffix in (".jpg", ".png"):
            calls[0] += 1
            if calls[0] in failing:
                raise OSError(errno.ESTALE, "Stale file handle")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", flaky)
    monkeypatch.setattr("groundwork.data.reach.PAUSE", 0.001)
    assert stored_after(images, tmp_path / "waited") == whole
    monkeypatch.setattr("groundwork.data.reach.PATIENCE", 0.01)
    calls[0], failing = 0, range(2, 10**6)
    assert run(images, tmp_path / "ended") == 3
    assert "Stale file handle" in (told := capsys.readouterr().err) and "goes on where" in told
    assert not (tmp_path / "ended" / "index.json").exists()
    failing = range(0)
    assert stored_after(images, tmp_path / "ended") == whole


def stored_after(images: Path, shards: Path) -> dict[str, bytes]:
    assert run(images, shards) == 0
    return stored(open_shards(str(shards), shards))


def test_a_disk_without_locks_is_packed_onto_and_a_full_one_told(
    tmp_path: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(descriptor: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("pretrain.pack_shards.fcntl.flock", refuse)
    assert run(images, tmp_path / "a") == 0

    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(pack_shards, "write_file", full)
    assert run(images, tmp_path / "b") == 3
    assert "No space left on device. Make room" in capsys.readouterr().err


def test_a_folder_that_goes_away_while_others_stay_is_waited_for(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(images, other)
    read = Path.read_bytes

    def goes(self: Path) -> bytes:
        if self.parent == other:
            other.rename(tmp_path / "gone")
            monkeypatch.undo()
            monkeypatch.setattr("groundwork.data.reach.PATIENCE", 0.0)
            monkeypatch.setattr("groundwork.data.reach.PAUSE", 0.001)
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", goes)
    assert run(images, other, tmp_path / "shards") == 3
    assert not (tmp_path / "shards" / "index.json").exists()
    (tmp_path / "gone").rename(other)
    monkeypatch.undo()
    assert run(images, other, tmp_path / "shards") == 0
    assert len(stored(open_shards(str(tmp_path / "shards"), tmp_path))) == 2 * len(
        list(images.rglob("*.*"))
    )
