"""The page of a run: everything in it, nothing outside it, and a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from groundwork.backbones import build_backbone
from groundwork.backbones.product import save_product
from groundwork.checkpoint import save
from groundwork.config import to_yaml
from groundwork.principal import principal_colours
from pretrain.recipe import resolve
from pretrain.report import main, save_sheet, write_report
from pretrain.report_pictures import look

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture
def run(tmp_path: Path, make_jpeg: Callable[..., bytes]) -> Path:
    """A run folder as a finished run leaves it."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed in range(6):
        (pictures / f"{seed}.jpg").write_bytes(make_jpeg(seed))
    folder = tmp_path / "run <1>"  # a name that is no HTML
    folder.mkdir()
    recipe = resolve("inpainting", None, [f"data.train={pictures}", f"data.cache={tmp_path}"])
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    lines = [{"step": 0, "probe/rankme": 12.5, "probe/ap": 0.125}]
    lines += [{"step": n, "train/loss": 1 / n, "optim/lr": 0.1} for n in (1, 2, 3)]
    lines += [{"step": 3, "probe/rankme": 20.25, "probe/ap": 0.375}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "status.json").write_text('{"state": "done", "exit_code": 0, "message": "<kept>"}')
    (folder / "machine.json").write_text('{"cores": 2}')
    for step, value in ((0, 10), (3, 200)):
        sheet = torch.full((2, 3, 8, 8), value, dtype=torch.uint8)
        save_sheet(sheet, folder / "pictures" / f"step-{step}-reconstruction.png")
        save_sheet(sheet * 0, folder / "pictures" / f"step-{step}-truth.png")
    torch.manual_seed(0)
    backbone = build_backbone("timm/resnet18")
    save_product(folder / "pretrained.safetensors", {"backbone": backbone}, {"task": "inpainting"})
    return folder


def test_the_page_has_everything_in_it(run: Path) -> None:
    page = write_report(run).read_text()
    assert "<td>12.5</td><td>20.25</td>" in page and "<td>0.125</td><td>0.375</td>" in page
    assert "<td>1</td><td>0.3333</td>" in page
    assert "reconstruction, step 0" in page and "reconstruction, step 3" in page
    assert page.count("<figcaption>truth") == 1  # the same at both steps
    assert "Nearest neighbours" in page and "C4: the three main directions" in page
    assert "weight_decay" in page and "&quot;cores&quot;: 2" in page
    # No address to load from, and names are text.
    assert not re.search(r'(src|href)=(?!"data:)', page)
    assert "run &lt;1&gt;" in page and "<kept>" not in page


def test_a_run_that_has_only_begun_has_a_page_too(run: Path) -> None:
    (run / "pretrained.safetensors").unlink()
    shutil.rmtree(run / "pictures")
    (run / "metrics.jsonl").write_text('{"step": 0, "probe/rankme": 12.5}\n')
    page = write_report(run).read_text()
    assert "Not shown:" in page and "No pictures yet" in page and "No curve yet" in page


@pytest.mark.parametrize("prefix", ["", "tasks.inpainting."])
def test_a_run_that_goes_on_shows_its_newest_checkpoint(run: Path, prefix: str) -> None:
    (run / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text().replace("name: yolo12n", "name: timm/resnet18")
    )
    (run / "pretrained.safetensors").unlink()
    torch.manual_seed(0)
    tensors = build_backbone("timm/resnet18").state_dict()
    task = {f"{prefix}backbone.{name}": tensor for name, tensor in tensors.items()}
    task["target_backbone.stem"] = torch.zeros(1)
    save(run / "checkpoints", 40, {"task": task}, {"state": {}}, keep=2)
    page = write_report(run).read_text()
    assert "Of the checkpoint of step 40" in page and "Nearest neighbours" in page
    task = {"backbone.other": torch.zeros(1)}
    save(run / "checkpoints", 50, {"task": task}, {"state": {}}, keep=2)
    assert "step-50 holds no timm/resnet18" in write_report(run).read_text()


def test_a_loss_that_was_not_finite_is_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/loss": null}\n')
    assert "<td>1</td><td>0.3333</td>" in write_report(run).read_text()


def test_a_line_that_is_being_written_is_left_out(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    assert "<h2>Curves</h2>" in write_report(run).read_text()
    assert main([str(run), "--out", str(run / "nowhere" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_browser_shows_every_picture(run: Path, tmp_path: Path) -> None:
    page = write_report(run, tmp_path / "page.html")
    count = page.read_text().count("<img")
    # The page says how many of its pictures were decoded once they are all there.
    script = (
        "<script>window.onload=()=>{document.title='shown '+[...document.images].filter("
        "i=>i.naturalWidth>0).length}</script>"
    )
    page.write_text(page.read_text().replace("</body>", script + "</body>"))
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert count > 6
    assert f"<title>shown {count}</title>" in done.stdout


def test_cells_that_are_alike_have_one_colour() -> None:
    maps = torch.zeros(2, 5, 4, 4)
    maps[0, 1, :2] = 3.0  # the upper half of the first picture
    colours = principal_colours(maps)
    upper, lower = colours[0, :, 0, 0], colours[0, :, 3, 3]
    assert not torch.equal(upper, lower)
    assert (colours[0, :, :2] == upper.view(3, 1, 1)).all()
    assert (colours[1] == lower.view(3, 1, 1)).all()


def test_features_that_are_not_finite_end_no_run() -> None:
    maps = torch.randn(2, 5, 4, 4)
    maps[0, 2, 1, 1], maps[1, 0, 0, 0] = float("nan"), float("inf")
    assert principal_colours(maps).shape == (2, 3, 4, 4)


def test_the_nearest_neighbour_of_a_picture_is_its_double() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("timm/resnet18").train()
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    pixels = torch.cat((pixels, pixels))
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    seen = look(backbone, pixels, shown=2, queries=4, k=3)
    assert seen.neighbours[:, 1].tolist() == [
        (row + 4) % 8 for row in seen.neighbours[:, 0].tolist()
    ]
    assert all((row[1:] != row[0]).all() for row in seen.neighbours)
    assert [tuple(level.shape) for level in seen.levels.values()] == [(2, 3, 64, 64)] * 3
    assert backbone.training
    same: dict[str, Tensor] = backbone.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in state.items())
