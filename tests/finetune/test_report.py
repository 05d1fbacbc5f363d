"""The page of a fine-tuning: figures, curves, and what is found beside what is labeled."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from finetune.detector import build_detector
from finetune.evaluate import evaluate
from finetune.metrics import Found
from finetune.plots import confusion_of
from finetune.recipe import resolve
from finetune.report import _pictures, write_report
from finetune.weights import About, parts_of, save_detector
from groundwork.config import to_yaml
from groundwork.data.labels import open_labeled
from groundwork.errors import DataError


@pytest.fixture
def run(labeled: Path, tmp_path: Path) -> Path:
    """A run folder as a finished run leaves it."""
    folder = tmp_path / "run <1>"  # a name that is no HTML
    (folder / "pictures").mkdir(parents=True)
    recipe = resolve(None, [f"data.train={labeled}", f"data.cache={tmp_path}"])
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    lines = [{"step": n, "train/loss": 1 / n, "optim/lr": 0.1} for n in (1, 2, 3)]
    lines += [{"step": n, "eval/ap": n / 10} for n in (2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "status.json").write_text('{"state": "done", "exit_code": 0, "message": "<kept>"}')
    (folder / "machine.json").write_text('{"cores": 2}')
    Image.new("RGB", (16, 16), "red").save(folder / "pictures" / "step-0.png")
    torch.manual_seed(0)
    detector = build_detector("yolo12n", 2).eval()
    save_detector(
        folder / "detector.safetensors", parts_of(detector), names=["red", "blue"], image_size=64,
        metadata={},
    )  # fmt: skip
    val = open_labeled(str(labeled), "val", cache=tmp_path, cache_bytes=10**6)
    found = evaluate(detector, val, image_size=64)
    val.close()
    assert found is not None
    results = {"split": "val", "step": 3, "steps": 3, **found.to_json()}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_the_page_has_everything_in_it(run: Path) -> None:
    page = write_report(run).read_text()
    results = json.loads((run / "results.json").read_text())
    assert f"<th>ap</th><td>{results['ap']:.4f}</td>" in page
    assert "<th>boxes</th><td>8</td>" in page
    assert re.search(r"<tr><th>blue</th><td>0\.\d{4}</td><td>0\.\d{4}</td><td>4</td>", page)
    for picture in ("confusion", "train/loss", "eval/ap", "batch", "labels", "found"):
        assert f'<img alt="{picture}" src="data:image/' in page
    assert "weight_decay" in page and "&quot;cores&quot;: 2" in page
    # No address to load from, and names are text.
    assert not re.search(r'(src|href)=(?!"data:)', page)
    assert "run &lt;1&gt;" in page and "<kept>" not in page


def test_a_run_that_has_only_begun_has_a_page_too(run: Path) -> None:
    for name in ("detector.safetensors", "results.json", "pictures/step-0.png"):
        (run / name).unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": null}\n{"step": 2, "tr')
    page = write_report(run).read_text()
    for sentence in ("Not scored yet", "No curve yet", "No pictures yet", "Not shown: There is no"):
        assert sentence in page
    assert "run <1>" not in page  # of the file that is not there


def test_labels_and_what_is_found_are_drawn_in_the_same_picture(
    labeled: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finder that returns the labels draws what the labels draw; below its score it is empty."""
    val = open_labeled(str(labeled), "val", cache=tmp_path, cache_bytes=10**6)
    truth = iter([val.look(index, 0)[2] for index in range(4)])

    class Sure:
        def __init__(self, detector: object) -> None: ...

        def __call__(self, frames: npt.NDArray[np.uint8]) -> list[Found]:
            labels = next(truth)
            assert frames.shape == (1, 64, 64, 3)
            # 80 x 64 pictures: 64 x 51 in the frame, 6 rows from its top.
            boxes = labels.boxes * 0.8 + np.array([0, 6, 0, 6], np.float32)
            return [Found(boxes, np.full(2, 0.6, np.float32), labels.classes)]

    monkeypatch.setattr("finetune.report.DetectorFinder", Sure)
    detector = build_detector("yolo12n", 2)
    about = About(("red", "blue"), 64, {})
    per_class: dict[str, dict[str, float | None]] = {
        "red": {"f1_score": 0.7},
        "blue": {"f1_score": None},
    }
    rows = _pictures(detector, about, val, per_class)
    assert len(rows) == 4
    for labels, found in rows:
        assert labels.size == found.size == (480, 384)
        one, other = np.asarray(labels).astype(int), np.asarray(found).astype(int)
        differs = np.abs(one - other).max(2) > 0
        assert 0 < differs.mean() < 0.1  # red has no box, and blue's tells its score
    with pytest.raises(DataError, match="only the detector has green"):
        _pictures(detector, About(("red", "green"), 64, {}), val, per_class)
    val.close()


def test_a_confusion_of_many_classes_is_no_larger_than_one_of_few() -> None:
    names = [f"class {number}" for number in range(400)]
    figure = confusion_of(np.eye(401, dtype=np.int64), names)
    assert max(figure.get_size_inches()) <= 21
    assert not figure.axes[0].get_xticklabels()[0].get_text().startswith("class")
