"""Checkpoints are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import logging
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from groundwork import checkpoint
from groundwork.errors import CheckpointError
from tests.commands import run
from tests.full_disk import full_disk

TENSORS = {"task": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.int64)}}


def write(folder: Path, step: int, keep: int = 3) -> Path:
    tensors = {"task": {key: value + step for key, value in TENSORS["task"].items()}}
    return checkpoint.save(folder, step, tensors, {"state": {"step": step}}, keep)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    found = checkpoint.load(write(tmp_path, 5))
    assert found.step == 5
    assert found.documents["state"] == {"step": 5}
    assert torch.equal(found.tensors["task"]["a"], TENSORS["task"]["a"] + 5)
    assert found.tensors["task"]["b"].dtype == torch.int64


def test_channels_last_and_shared_tensors_are_saved(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    path = checkpoint.save(tmp_path, 1, {"t": {"a": image, "again": image}}, {}, 3)
    loaded = checkpoint.load(path).tensors["t"]
    assert torch.equal(loaded["a"], image)
    assert torch.equal(loaded["again"], image)


def test_the_newest_are_kept_and_found(tmp_path: Path) -> None:
    for step in (2, 10, 9, 30):
        write(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-30"]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 30


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None


def test_a_flipped_bit_is_found_and_the_older_one_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2) / "task.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"task\.safetensors is damaged"):
        checkpoint.load(path.parent)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "is damaged" in caplog.text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, 2)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        checkpoint.load(path)


def test_nothing_but_tensors_and_json_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, 2)
    (path / "x.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"]["x.pkl"] = checkpoint._sha256(path / "x.pkl")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="of a kind that checkpoints do not hold"):
        checkpoint.load(path)


KILL = """
import os, signal, sys
from pathlib import Path
import torch
from groundwork import checkpoint
folder, victim = Path(sys.argv[1]), int(sys.argv[2])
points = 0
def counted(function):
    def call(*arguments, **keywords):
        global points
        points += 1
        if points == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return call
os.fsync = counted(os.fsync)
checkpoint.save_file = counted(checkpoint.save_file)
Path.mkdir = counted(Path.mkdir)
Path.write_text = counted(Path.write_text)
Path.replace = counted(Path.replace)
checkpoint.shutil.rmtree = counted(checkpoint.shutil.rmtree)
step = int(sys.argv[3])
checkpoint.save(folder, step, {"task": {"a": torch.full((9,), 2.0)}}, {"state": {}}, 1)
print(points)
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2])  # 1 is there already
def test_a_process_killed_at_any_point_leaves_a_whole_checkpoint(tmp_path: Path, step: int) -> None:
    seen = set()
    script = tmp_path / "kill.py"
    script.write_text(KILL)
    for victim in range(1, 40):
        folder = tmp_path / str(victim)
        write(folder, 1)
        done = run(1, tmp_path, str(folder), str(victim), str(step), script=str(script))
        checkpoint.sweep(folder)
        found = checkpoint.latest(folder)
        assert found is not None
        value = float(found.tensors["task"]["a"].flatten()[0])
        seen.add(value)
        assert found.step == (step if value == 2 else 1)
        assert not list(folder.glob(".*"))
        if done.returncode == 0:
            assert value == 2
            break
        assert done.returncode == -signal.SIGKILL
    else:
        pytest.fail("the save never came to its end")
    assert victim > 10
    assert seen == {1.0, 2.0}


def test_a_full_disk_is_told_and_the_older_one_stays(tmp_path: Path) -> None:
    write(tmp_path, 1)
    big = {"task": {"a": torch.zeros(1_000_000)}}
    with (
        full_disk(100_000),
        pytest.raises(
            CheckpointError, match=r"os error 27\).*4,000,000 bytes.*step-1 is untouched"
        ),
    ):
        checkpoint.save(tmp_path, 2, big, {}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize(
    "full", [OSError(errno.ENOSPC, "No space left"), SafetensorError("(os error 28)")]
)
def test_on_a_full_disk_the_oldest_make_room_but_not_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Exception
) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    room, save_file = 1, safetensors.torch.save_file

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if len(list(tmp_path.glob("step-*"))) > room:
            raise full
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save)
    write(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-4"]
    room = 0
    with pytest.raises(CheckpointError, match="step-4 is untouched"):
        write(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
