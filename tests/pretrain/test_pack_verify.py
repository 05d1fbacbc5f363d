"""Claims about finding damage in what was packed."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from groundwork.data.shard_sets import open_shards
from tests.pretrain.test_pack import ROOT, run, stored


def _flip(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 4
    return bytes(changed)


DAMAGES: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "R11 cut in data": (lambda good: good[:1000], "cut off"),
    "R11 cut at a header": (lambda good: good[: _second(good)], "cut off"),
    "R11 cut in a header": (lambda good: good[: _second(good) + 100], "cut off"),
    "R12 a bit in a header": (lambda good: _flip(good, _second(good) + 3), "damaged header"),
    "R12 a bit in a picture": (lambda good: _flip(good, 700), "bytes of a picture have changed"),
    "R12 a bit in the padding": (lambda good: _flip(good, _second(good) - 1), "changed"),
    "R13 zero bytes": (lambda good: b"", "empty"),
    "R13 null blocks": (lambda good: bytes(10240), "its index says"),
    "R13 null blocks of the same size": (lambda good: bytes(len(good)), "0 members"),
    "R13 garbage": (lambda good: b"garbage " * 1000, "not a tar file"),
    "R13 gzip": (gzip.compress, "compressed"),
    "R13 missing": (lambda good: None, "No such file"),
}


def _second(tar: bytes) -> int:
    """Find where the second member's header begins."""
    return 512 + -(-int(tar[124:135], 8) // 512) * 512


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_finds_every_damage_and_names_the_shard(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / "shards"
    assert run(images, folder, "--shard-size", 4) == 0
    assert run("verify", folder) == 0
    spoil, said = DAMAGES[damage]
    shard = folder / "shard-000001.tar"
    spoilt = spoil(shard.read_bytes())
    if spoilt is None:
        shard.unlink()
    else:
        shard.write_bytes(spoilt)
    capsys.readouterr()
    assert run("verify", folder) == 3
    shown = capsys.readouterr().out
    assert "shard-000001.tar" in shown
    assert "shard-000000" not in shown
    assert said in shown
    assert "What to do" in shown
    assert "1 problems in 3 shards" in shown


@pytest.mark.parametrize("name", ["index.json", "shard-000001.samples.json"])
@pytest.mark.parametrize("how", ["remove", "flip first", "flip", "cut"])
def test_verify_finds_a_damaged_index(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    folder = tmp_path / "shards"
    assert run(images, folder, "--shard-size", 4) == 0
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if how != "remove":
        position = {"flip first": 3, "flip": len(content) // 2}.get(how)
        path.write_bytes(content[:-9] if position is None else _flip(content, position))
    capsys.readouterr()
    assert run("verify", folder) == 3
    shown = capsys.readouterr().out
    assert name in shown
    assert "1 problems" in shown


def test_verify_finds_an_extra_shard(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    assert run(images, folder) == 0
    (folder / "extra.tar").write_bytes((folder / "shard-000000.tar").read_bytes())
    assert run("verify", folder) == 3
    assert "extra.tar: no index names this shard" in capsys.readouterr().out


def test_shards_of_others_are_checked_for_structure(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(images, tmp_path / "own", "--shard-size", 4) == 0
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for tar in (tmp_path / "own").glob("*.tar"):
        (theirs / tar.name).write_bytes(tar.read_bytes())
    assert run("verify", theirs) == 0
    assert "structure only" in capsys.readouterr().out
    shard = theirs / "shard-000001.tar"
    shard.write_bytes(_flip(shard.read_bytes(), 5))
    assert run("verify", theirs) == 3
    assert "shard-000001.tar: " in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_works_from_any_folder_on_real_pictures(
    tmp_path: Path, shared_data: Path
) -> None:
    pictures = sorted((shared_data / "aerial-hrplanes" / "images" / "val").iterdir())[:40]
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in pictures))
    for arguments in (["list.txt", "shards"], ["verify", "shards"]):
        done = subprocess.run(
            [sys.executable, "-m", "pretrain.pack", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    found = stored(open_shards(tmp_path / "shards", tmp_path))
    assert found == {path.name: path.read_bytes() for path in pictures}
