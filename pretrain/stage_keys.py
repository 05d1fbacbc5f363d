"""Keys that one stage gives to another: for few_labels, and for studies of its stages."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from finetune import recipe as finetune_recipes
from groundwork.data.labels import has_split
from pretext_tasks import load_task
from pretext_tasks.self_training import SelfTrainingConfig
from pretrain import recipe as pretrain_recipes

logger = logging.getLogger(__name__)

_LEAST = 0.01  # a score that teaches


def probe_keys(
    own: pretrain_recipes.Recipe, labels: finetune_recipes.Recipe, given: Sequence[str]
) -> list[str]:
    """Return the keys of a detection probe on the pictures of a fine-tuning.

    It chooses no weights, unless `given` has probe.select or probe.patience. Empty where the recipe
    or `given` names pictures for such a probe, or none (null), where no pictures are held out, and
    where the two stages see pictures in other bands or values.
    """
    data = labels.data
    named = tuple(f"probe.detection.{name}=" for name in ("data", "train_list", "val", "holdout"))
    if own.probe.detection.data is not None or any(key.startswith(named) for key in given):
        return []
    if not (data.holdout or data.val or has_split(data.train, "val")):
        return []
    if own.data.reading().mapping != data.reading().mapping:
        return []
    keys = {
        "data": data.train,
        "train_list": data.train_list,
        "val": data.val,
        "holdout": data.holdout,
        "image_size": labels.image_size,
    }
    chooses = any(key.startswith(("probe.select=", "probe.patience=")) for key in given)
    return [
        *([] if chooses else ["probe.select=last"]),
        *(f"probe.detection.{name}={value}" for name, value in keys.items() if value),
    ]


def taught_from_val(recipe: str, keys: Sequence[str]) -> SelfTrainingConfig | None:
    """Return the keys of self-training where its scores are to be those that are best on val.

    None where the teacher looks at views, which val has none of, and where keys give a score.
    """
    if any(key.startswith("task.score") for key in keys):
        return None
    found = pretrain_recipes.resolve(None, recipe, keys)
    _, task = pretrain_recipes.with_task_defaults(found, load_task(found.task_name).Config)
    return task if isinstance(task, SelfTrainingConfig) and task.find == "picture" else None


def score_keys(per_class: Mapping[str, Mapping[str, float | None]], unsure: float) -> list[str]:
    """Return the keys of self-training's scores: of each class that with the best F1 on val.

    A class of which val shows nothing must be as sure as the surest of the others. Where a score is
    not above `unsure`, as it was meant, what is unsure begins at half of it: nothing that is found
    may be denied. No keys where nothing right is found at all.
    """
    found = {name: one["f1_score"] for name, one in per_class.items()}
    best = [score for score in found.values() if score is not None]
    if not best:
        return []
    scores = {name: max(max(best) if s is None else s, _LEAST) for name, s in found.items()}
    logger.info("Taught from these scores on, which are best on val: %s", scores)
    keys = [f"task.score={json.dumps(scores)}"]
    if (least := min(scores.values())) <= unsure:
        keys.append(f"task.unsure={least / 2:.4f}")
    return keys


def evaluation_keys(recipe: Mapping[str, Any]) -> list[str] | None:
    """Return what finetune.evaluate must be told to score as a fine-tuning with this recipe does.

    None where nothing is held out.
    """
    data, shown = recipe["data"], recipe["eval"]
    keys = [f"{name}={shown[name]}" for name in ("batch_size", "score", "iou", "most")]
    keys += [f"image_size={recipe['image_size']}", f"data.max_pixels={data['max_pixels']}"]
    keys += [f"data.cache={data['cache']}"] if data["cache"] else []
    if data["holdout"]:
        keys += [f"data.val={data['train']}", f"data.holdout={data['holdout']}"]
        keys += ["data.split=train"] if has_split(data["train"], "train") else []
        keys += [f"data.train_list={data['train_list']}"] if data["train_list"] else []
        return keys
    if data["val"] is None and not has_split(data["train"], "val"):
        return None
    return [*keys, f"data.val={data['val'] or data['train']}"]
