"""Thin evaluation until the whole is here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster

from finetune.augment.letterbox import letterbox_geometry
from finetune.augment.warp import GREY
from groundwork import colour
from groundwork.data.decode import open_picture


@dataclass(frozen=True)
class Results:
    ap: float
    ap50: float
    ap75: float
    per_class: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"ap": self.ap, "ap50": self.ap50, "ap75": self.ap75, "per_class": self.per_class}


@torch.inference_mode()
def evaluate(detector: Any, labeled: Any, *, image_size: int, batch_size: int = 16, workers: int = 0, score: float = 0.001, iou: float = 0.7, most: int = 300, rank: int = 0, world: int = 1, group: Any = None) -> Results | None:
    modes = [(m, m.training) for m in detector.modules()]
    detector.eval()
    images, annotations, rows = [], [], []
    todo = []
    number = 0

    def flush() -> None:
        if not todo:
            return
        h = max(t[1].shape[0] for t in todo); w = max(t[1].shape[1] for t in todo)
        h, w = -(-h // 32) * 32, -(-w // 32) * 32
        frame = np.full((len(todo), h, w, 3), GREY, np.uint8)
        for i, (_, px, _) in enumerate(todo):
            frame[i, : px.shape[0], : px.shape[1]] = px
        x = colour.normalise(torch.from_numpy(frame), detector.backbone.mean, detector.backbone.std)
        x = x.to(memory_format=torch.channels_last)
        for (n, _, scale), found in zip(todo, detector.detect(x, score=score, iou=iou, most=most), strict=True):
            b = (found.boxes / scale).tolist()
            for box, s, c in zip(b, found.scores.tolist(), found.classes.tolist(), strict=True):
                rows.append({"image_id": n, "category_id": c, "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]], "score": s})
        todo.clear()

    for shard, size in enumerate(labeled.shard_sizes):
        for index in range(int(size)):
            sample = labeled.read(shard, index)
            picture = open_picture(sample.image)
            found = labeled.annotations(sample, picture)
            images.append({"id": number, "width": picture.width, "height": picture.height})
            for box, label, crowd in zip(found.boxes.tolist(), found.classes.tolist(), found.crowd.tolist(), strict=True):
                w, h = box[2] - box[0], box[3] - box[1]
                annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": label, "bbox": [box[0], box[1], w, h], "area": w * h, "iscrowd": int(crowd)})
            g = letterbox_geometry(picture.width, picture.height, (image_size, image_size))
            [px] = picture.cut([(0.0, 0.0, float(picture.width), float(picture.height))], g.shown(picture.width, picture.height))
            todo.append((number, px, g.scale))
            number += 1
            if len(todo) == batch_size:
                flush()
    flush()
    for m, t in modes:
        m.training = t
    names = labeled.names
    gt = COCO({"images": images, "annotations": annotations, "categories": [{"id": i, "name": n} for i, n in enumerate(names)]})
    if not rows:
        return Results(0.0, 0.0, 0.0, {})
    e = COCOeval_faster(gt, gt.loadRes(rows), "bbox", print_function=lambda *a: None)
    e.evaluate(); e.accumulate(); e.summarize()
    p = e.eval["precision"][:, :, :, 0, -1]
    per = {n: {"ap": float(p[:, :, i].mean())} for i, n in enumerate(names)}
    return Results(float(e.stats[0]), float(e.stats[1]), float(e.stats[2]), per)
