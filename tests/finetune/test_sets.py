"""Which labeled pictures a run has: what is held out where no set is for validation."""

from __future__ import annotations

import io
import json
import logging
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from finetune import evaluate
from finetune.recipe import resolve
from finetune.sets import open_sets, tell_defects
from groundwork.data.label_table import HeldOut
from groundwork.data.labels import LabeledSamples
from groundwork.data.reading import PLAIN
from groundwork.errors import DataError, UsageError


def _paths(samples: LabeledSamples | None) -> list[str]:
    assert samples is not None
    return [
        samples.read(shard, place).key
        for shard, size in enumerate(samples.shard_sizes)
        for place in range(size)
    ]


def _root(root: Path, *labels: str) -> Path:
    """Make a YOLO root without splits: one picture for each text of labels."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for number, text in enumerate(labels):
        Image.new("RGB", (64, 48), "gray").save(root / "images" / f"{number}.png")
        (root / "labels" / f"{number}.txt").write_text(text)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return _root(tmp_path / "set", *["0 0.5 0.5 0.2 0.2\n"] * 10)


def test_a_share_is_held_out_and_stays_so(root: Path) -> None:
    recipe = resolve(None, [f"data.train={root}", "data.holdout=0.3"])
    sets, again = open_sets(recipe), open_sets(recipe)
    train, val = _paths(sets.train), _paths(sets.val)
    assert len(val) == 3 and len(train) == 7
    assert len({*train, *val}) == 10
    assert _paths(again.val) == val
    for one in (sets, again):
        one.close()


@pytest.mark.parametrize("splits", [("val",), ("val", "test")])
def test_a_root_without_a_train_split_is_not_trained_on_whole(
    splits: tuple[str, ...], root: Path
) -> None:
    """Its validation pictures would be learned, and their AP would be of known pictures."""
    for folder in ("images", "labels"):
        for split in splits:
            (root / folder / split).mkdir()
        for number, file in enumerate(sorted((root / folder).glob("*.*"))):
            file.rename(root / folder / splits[number % len(splits)] / file.name)
    with pytest.raises(DataError, match=r"no train split for fine-tuning \(data.train\)"):
        open_sets(resolve(None, [f"data.train={root}"]))


def test_of_a_list_a_share_is_held_out(root: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{number}.png\n" for number in range(4)))
    keys = [f"data.train={root}", f"data.train_list={names}", "data.holdout=0.5"]
    sets = open_sets(resolve(None, keys))
    paths = _paths(sets.train) + _paths(sets.val)
    assert len(sets.train) == 2 and len(set(paths)) == 4
    sets.close()


def test_a_set_without_validation_keeps_its_test_split(labeled: Path) -> None:
    shutil.rmtree(labeled / "images" / "val")
    (labeled / "annotations" / "val.json").unlink()
    sets = open_sets(resolve(None, [f"data.train={labeled}", "data.holdout=0.2"]))
    assert len(sets.train) == 8 and sets.val is not None and len(sets.val) == 2
    assert sets.test is not None and len(sets.test) == 3
    sets.close()


def test_what_has_a_validation_set_needs_no_holdout(labeled: Path, root: Path) -> None:
    with pytest.raises(UsageError, match=r"data.holdout=0.2: .* a split of .*Leave one"):
        open_sets(resolve(None, [f"data.train={labeled}", "data.holdout=0.2"]))
    with pytest.raises(UsageError, match=r"data.holdout=0.2: there are pictures"):
        open_sets(resolve(None, [f"data.train={root}", f"data.val={labeled}", "data.holdout=0.2"]))


def test_held_out_shares_by_hand() -> None:
    paths = [f"a/{number}.png" for number in range(10)]
    for share, count in ((0.01, 1), (0.25, 2), (0.999, 9)):
        held, rest = HeldOut(share, True).of(paths), HeldOut(share, False).of(paths)
        assert len(held) == count and sorted(held + rest) == list(range(10))
    half = {paths[number] for number in HeldOut(0.5, True).of(paths)}
    more = [*paths, "b/0.png"]
    assert len(half & {more[number] for number in HeldOut(0.5, True).of(more)}) >= 4
    with pytest.raises(DataError, match=r"1 picture\(s\) cannot be split"):
        HeldOut(0.5, True).of(["a.png"])


def test_labels_in_the_wrong_unit_train_nothing(tmp_path: Path) -> None:
    root = _root(tmp_path / "set", *["0 30 20 10 10\n"] * 3)  # pixels
    sets = open_sets(resolve(None, [f"data.train={root}"]))
    with pytest.raises(DataError, match=r"No box of .* is left .*3 x .*outside.*shares"):
        tell_defects(sets, tmp_path, 640)
    sets.close()


def test_a_defect_of_what_was_split_is_told_once(
    tmp_path: Path, labeled: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(labeled / "images" / "val")
    (labeled / "annotations" / "val.json").unlink()
    file = labeled / "annotations" / "train.json"
    document = json.loads(file.read_text())
    document["images"].append({"id": 99, "file_name": "gone.png", "width": 80, "height": 64})
    file.write_text(json.dumps(document))
    sets = open_sets(resolve(None, [f"data.train={labeled}", "data.holdout=0.2"]))
    with caplog.at_level(logging.WARNING, "finetune.sets"):
        tell_defects(sets, tmp_path, 640)
    sets.close()
    assert len((tmp_path / "label-defects.jsonl").read_text().splitlines()) == 1
    assert "validation" not in caplog.text


def test_validation_without_a_box_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = _root(tmp_path / "set", *["0 0.5 0.5 0.2 0.2\n"] * 4)
    told = []
    for _ in range(2):
        caplog.clear()
        sets = open_sets(resolve(None, [f"data.train={root}", "data.holdout=0.25"]))
        with caplog.at_level(logging.WARNING, "finetune.sets"):
            tell_defects(sets, tmp_path, 640)
        [held_out] = _paths(sets.val)
        sets.close()
        told.append("No picture for validation has a box" in caplog.text)
        (root / "labels" / f"{Path(held_out).name}.txt").write_text("")
    assert told == [False, True]


def test_boxes_that_are_too_small_at_the_image_size_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = _root(tmp_path / "set", "0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.02 0.2\n")
    sets = open_sets(resolve(None, [f"data.train={root}"]))
    told = []
    for size in (640, 32):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "finetune.sets"):
            tell_defects(sets, tmp_path, size)
        told.append("1 of 2 boxes for training have a side below 2 px" in caplog.text)
    sets.close()
    assert told == [False, True]


def test_an_evaluation_finds_what_training_held_out(tmp_path: Path) -> None:
    root = _root(tmp_path / "set", *["0 0.5 0.5 0.2 0.2\n"] * 10)
    sets = open_sets(resolve(None, [f"data.train={root}", "data.holdout=0.3"]))
    held = _paths(sets.val)
    sets.close()
    keys = evaluate.Sets(val=str(root), holdout=0.3)
    found = evaluate._open(str(root), "val", keys, PLAIN)
    assert _paths(found) == held and len(held) == 3
    found.close()


def test_defects_in_shards_of_others_are_told_before_training(
    tmp_path: Path, make_jpeg: Callable[..., bytes], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    label = {"boxes": [[1, 1, 30, 30], [9, 9, 5, 5]], "classes": [0, 0], "names": ["x", "x"]}
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, content in (("a.jpg", make_jpeg(0)), ("a.json", json.dumps(label).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    keys = [f"data.train={folder}", f"data.val={folder}", f"data.cache={tmp_path}"]
    sets = open_sets(resolve(None, keys))
    with caplog.at_level(logging.WARNING, "finetune.sets"):
        tell_defects(sets, tmp_path, 640)
    sets.close()
    assert "Labels for training: 1 x box" in caplog.text
    [defect] = (tmp_path / "label-defects.jsonl").read_text().splitlines()
    assert "a.json" in defect


@pytest.mark.parametrize("crowds", [1, 3, 20])
def test_boxes_that_are_crowds_are_not_taken_for_objects(
    labeled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, crowds: int
) -> None:
    """Masks that were drawn in CVAT come as iscrowd: 1."""
    for split in ("train", "val"):
        path = labeled / "annotations" / f"{split}.json"
        document = json.loads(path.read_text())
        for annotation in document["annotations"][:crowds]:
            annotation["iscrowd"] = 1
        path.write_text(json.dumps(document))
    sets = open_sets(resolve(None, [f"data.train={labeled}"]))
    if crowds == 20:
        with pytest.raises(DataError, match="nothing to learn: 20 of 20 boxes are crowds"):
            tell_defects(sets, tmp_path, 640)
    else:
        tell_defects(sets, tmp_path, 640)
        told = [record.getMessage() for record in caplog.records]
        # One in ten is what there may be.
        assert any("3 of 20 boxes are crowds" in line for line in told) == (crowds == 3)
        assert any(f"{crowds} of 8 boxes are crowds" in line for line in told)
    sets.close()


def test_a_picture_for_scoring_that_cannot_be_read_is_told_before_training(
    labeled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Scoring would end the run at it, after steps that are lost."""
    for split in ("train", "val", "test"):  # that of train is replaced by another
        (labeled / "images" / split / "01.png").write_bytes(b"no picture")
    sets = open_sets(resolve(None, [f"data.train={labeled}"]))
    with pytest.raises(DataError) as caught, caplog.at_level(logging.WARNING, "finetune.sets"):
        tell_defects(sets, tmp_path, 640)
    sets.close()
    assert "listed in" in caplog.text and "label-defects.jsonl" in caplog.text
    told = str(caught.value)
    assert "1 picture(s) for validation cannot be read, the first" in told and "01" in told
    assert "1 picture(s) for test" in told and told.count("eval.test=false") == 1
    assert len((tmp_path / "label-defects.jsonl").read_text().splitlines()) == 3


def test_pictures_without_any_box_are_nothing_to_learn_from(tmp_path: Path) -> None:
    sets = open_sets(resolve(None, [f"data.train={_root(tmp_path / 'set', '', '')}"]))
    with pytest.raises(DataError, match=r"None of the 2 pictures of .* has a box"):
        tell_defects(sets, tmp_path, 640)
    sets.close()


def test_what_reading_labels_changed_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = _root(tmp_path / "set", *["0 0.5 0.5 0.2 0.2\n"] * 4)
    sets = open_sets(resolve(None, [f"data.train={root}", "data.holdout=0.5"]))
    with caplog.at_level(logging.WARNING, "finetune.sets"):
        tell_defects(sets, tmp_path, 640)
    sets.close()
    assert caplog.text.count("nothing names the classes") == 1


def test_a_test_set_without_labels_says_how_to_go_without(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for split in ("train", "test"):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        Image.new("RGB", (64, 48), "gray").save(root / "images" / split / "0.png")
    (root / "labels" / "train" / "0.txt").write_text("1 0.5 0.5 0.2 0.2\n")
    with pytest.raises(DataError, match=r"has a label file.*eval\.test=false goes without"):
        open_sets(resolve(None, [f"data.train={root}"]))
    sets = open_sets(resolve(None, [f"data.train={root}", "eval.test=false"]))
    assert sets.test is None and sets.train.names == ("class_0", "class_1")
    sets.close()
