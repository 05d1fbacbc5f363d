"""Every recipe that is shipped resolves, and mistakes are told before torch is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from groundwork.config import read_yaml
from groundwork.errors import UsageError
from groundwork.settings import Budget
from pretext_tasks import TASKS, load_task
from pretrain import recipe as recipes
from tests.commands import FINETUNE, PRETRAIN, finished

ROOT = Path(__file__).parents[2]
WITH_TEACHER = ("distill", "self_training")
SHIPPED = sorted((ROOT / "recipes" / "pretrain").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_resolves_and_says_what_it_is(path: Path) -> None:
    name = read_yaml(path)["task"]["name"]
    needed = ["task.weights=FILE"] if name in WITH_TEACHER else []
    recipe = recipes.resolve(None, str(path), needed)
    task = load_task(recipe.task_name)
    resolved, config = recipes.with_task_defaults(recipe, task.Config)
    task.views(config, recipe.image_size)
    assert recipes.with_task_defaults(resolved, task.Config)[0] == resolved
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("Command:" in line for line in header)
    assert any("Measured:" in line for line in header)
    assert any("Cost:" in line for line in header)


def test_every_task_has_a_recipe_of_its_name() -> None:
    assert set(TASKS) <= {path.stem for path in SHIPPED}


def test_the_command_line_replaces_the_recipes_budget() -> None:
    recipe = recipes.resolve("byol", None, ["budget.epochs=7"])
    assert recipe.budget == Budget(epochs=7)
    with pytest.raises(UsageError, match="exactly one"):
        recipes.resolve("byol", None, ["budget.epochs=7", "budget.steps=3"])


@pytest.mark.parametrize(
    ("keys", "indicator"),
    [
        ([], None),
        (["probe.detection.data=ROOT"], "probe/ap"),
        (["probe.detection.data=ROOT", "probe.select=last"], None),
        (["probe.detection.data=ROOT", "probe.times=0"], None),
        (["probe.labeled=ROOT"], None),
        (["probe.labeled=ROOT", "probe.select=linear"], "probe/linear"),
    ],
)
def test_weights_are_chosen_by_boxes_where_there_are_any(
    keys: list[str], indicator: str | None
) -> None:
    assert recipes.resolve("byol", None, keys).probe.indicator() == indicator


def test_another_task_drops_the_recipes_task_keys(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("task: {name: byol, momentum: 0.9}\nbatch_size: 8\n")
    recipe = recipes.resolve("simclr", str(path), [])
    assert recipe.task == {"name": "simclr"}
    assert recipe.batch_size == 8
    assert recipes.resolve("byol", str(path), []).task == {"name": "byol", "momentum": 0.9}


@pytest.mark.parametrize(
    ("task", "recipe", "overrides", "sentence"),
    [
        ("boyl", None, [], "Did you mean byol?"),
        (None, None, [], "--task NAME"),
        (None, "generall", [], "There is no recipe 'generall'"),
        ("byol", None, ["task.name=jigsa"], "Did you mean jigsaw?"),
        ("byol", None, ["batch_size=10", "accumulate=3"], "not divisible"),
        ("byol", None, ["image_size=100"], "image_size=100: input should be a multiple of 32."),
        ("byol", None, ["optim.name=adam"], "optim.name=adam"),
    ],
)
def test_mistakes_are_told(
    task: str | None, recipe: str | None, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(UsageError) as caught:
        recipes.resolve(task, recipe, overrides)
    assert sentence in str(caught.value)


def test_a_mistake_in_the_tasks_own_keys_is_told() -> None:
    recipe = recipes.resolve("byol", None, ["task.momentun=0.9"])
    with pytest.raises(UsageError, match=r"task\.momentun.*task\.momentum\?"):
        recipes.with_task_defaults(recipe, load_task("byol").Config)


@pytest.mark.parametrize(
    "task", ["byol", "simclr", "dense", "regions", "lejepa", "distill", "self_training"]
)
def test_crops_that_cannot_be_drawn_are_refused(task: str) -> None:
    config = load_task(task).Config
    area = "large_scale" if task == "lejepa" else "crop_scale"
    more = ["task.weights=FILE"] if task in WITH_TEACHER else []
    for wrong in (f"{area}=[1.0,0.1]", f"{area}=[0,1]", f"{area}=[0.5,2]", "crop_ratio=[0,1]",
                  "crop_ratio=[2,1]"):  # fmt: skip
        recipe = recipes.resolve(task, None, [f"task.{wrong}", *more])
        with pytest.raises(UsageError, match=wrong.partition("=")[0]):
            recipes.with_task_defaults(recipe, config)


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        (
            PRETRAIN,
            ["--task", "byol", "optim.lrr=1"],
            "Unknown key optim.lrr. Did you mean optim.lr?",
        ),
        (FINETUNE, ["augment.mosaik.prob=1"], "Did you mean augment.mosaic.prob?"),
    ],
)
def test_a_mistake_is_told_before_torch_is_imported(
    script: str, arguments: list[str], told: str, tmp_path: Path
) -> None:
    done = finished([sys.executable, "-X", "importtime", script, *arguments], tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pydantic" in imported and not imported & {"torch", "timm", "accelerate"}


@pytest.mark.parametrize("prefix", recipes.FIXED)
def test_a_resumed_run_stays_the_same_model_on_the_same_stream(prefix: str) -> None:
    old = recipes.resolve("byol", None, ["data.train=pictures"])
    changed = {
        "task": "task.hidden_width=16", "backbone": "backbone.name=yolo12s", "seed": "seed=5",
        "image_size": "image_size=96", "optim.name": "optim.name=sgd", "ema": "ema.enabled=true",
        "data.window_shards": "data.window_shards=3", "data.bands": "data.bands=[1]",
        "data.value_range": "data.value_range=[0,4095]",
    }[prefix]  # fmt: skip
    with pytest.raises(UsageError, match=f"cannot change {prefix}"):
        recipes.refuse_changes(old, recipes.resolve("byol", None, ["data.train=pictures", changed]))
    harmless = recipes.resolve("byol", None, ["data.train=pictures", "threads=1"])
    assert recipes.refuse_changes(old, harmless) == ["threads: None -> 1"]


def test_shipped_recipes_say_only_what_differs() -> None:
    for path in SHIPPED:
        values = read_yaml(path)
        assert "threads" not in values
        assert "seed" not in values


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.bands=[3,2,1]", "scenes are drawn in colours"),
        ("data.bands=[]", r"data\.bands"),
        ("data.bands=[0,2,1]", r"data\.bands"),
        ("data.value_range=[5,5]", "the smaller first"),
    ],
)
def test_a_mapping_that_makes_no_sense_is_refused(override: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        recipes.resolve("byol", None, [override])
    assert recipes.resolve("byol", None, ["data.train=there", "data.bands=[3,2,1]"]).data.bands


def test_drawn_objects_are_for_drawn_scenes_unless_asked_for() -> None:
    assert recipes.resolve("byol", None, []).probe.labeled == "scenes"
    assert recipes.resolve("byol", None, ["data.train=there"]).probe.labeled is None
    assert recipes.resolve("byol+jigsaw", None, ["data.train=there"]).probe.labeled is None
    keys = ["data.train=there", "probe.labeled=scenes"]
    assert recipes.resolve("byol", None, keys).probe.labeled == "scenes"


def test_one_image_size_is_for_all_tasks_that_have_none_of_their_own() -> None:
    both = recipes.resolve("byol+inpainting", None, [])
    assert both.task["image_sizes"] == {"inpainting": 192} and both.image_size == 64
    assert not recipes.resolve("byol+inpainting", None, ["image_size=224"]).task.get("image_sizes")
    keys = ["image_size=224", "task.image_sizes.byol=96"]
    assert recipes.resolve("byol+inpainting", None, keys).task["image_sizes"] == {"byol": 96}


def test_drawn_objects_are_no_labels_of_pictures_with_four_channels() -> None:
    keys = ["data.train=there", "data.bands=[1,2,3,4]"]
    with pytest.raises(UsageError, match=r"probe\.labeled=scenes: drawn objects have three"):
        recipes.resolve("byol", None, [*keys, "probe.labeled=scenes"])
    made = recipes.resolve("byol", None, keys)
    assert made.data.reading().channels == 4
