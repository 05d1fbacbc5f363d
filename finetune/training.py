"""A detector with its loss, as the loop trains it; and how a pretrained part is handed over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from finetune.assign import Targets
from finetune.augment.letterbox import letterboxed
from finetune.detector import Detector
from finetune.losses import DetectionLoss, Loss
from finetune.recipe import LossKeys, Optim
from groundwork import colour
from groundwork.data.decode import Picture
from groundwork.data.labels import LabeledSamples
from groundwork.data.loader import Arrays, Loader
from groundwork.data.order import Order
from groundwork.modes import evaluating
from groundwork.precise_batchnorm import measure_statistics

# Pictures that BatchNorm is measured on.
MEASURED = 256
_AT_ONCE = 16


class Training(nn.Module):
    """Batch -> Loss; the only entry that distributed training sees."""

    def __init__(self, detector: Detector, loss: LossKeys) -> None:
        super().__init__()
        self.detector = detector
        self.loss = DetectionLoss(loss)
        self._frozen = (False, False, False)

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        """Colour and normalise the pictures; run the network; compare with the boxes."""
        image = self.coloured(batch)
        detector = self.detector
        backbone, neck, _ = self._frozen
        with torch.set_grad_enabled(torch.is_grad_enabled() and not backbone):
            pyramid = detector.backbone(image)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not neck):
            features = detector.neck(pyramid)
        raw = detector.head(features)
        targets = Targets(batch["boxes_sample"], batch["boxes"], batch["classes"])
        crowds = Targets(batch["crowds_sample"], batch["crowds"], batch["crowd_classes"])
        frozen = [detector.backbone] * backbone + [detector.neck] * neck
        with torch.autocast(image.device.type, enabled=False):
            return self.loss(
                detector, raw, (image.shape[2], image.shape[3]), targets, frozen, crowds
            )

    def coloured(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the pictures as the backbone wants them: N C H W."""
        backbone = self.detector.backbone
        return colour.apply(batch["image"], batch["colour"], backbone.mean, backbone.std)

    def seen(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what training sees, for a person: picture (uint8 N 3 H W on the CPU) and boxes.

        Crowds are among them, with classes below 0.
        """
        backbone = self.detector.backbone
        picture = colour.denormalise(self.coloured(batch), backbone.mean, backbone.std)
        return {
            "picture": picture,
            "boxes": torch.cat((batch["boxes"], batch["crowds"])).cpu(),
            "boxes_sample": torch.cat((batch["boxes_sample"], batch["crowds_sample"])).cpu(),
            "classes": torch.cat((batch["classes"], ~batch["crowd_classes"])).cpu(),
        }

    def freeze(self, *, backbone: bool, neck: bool, batchnorm: bool) -> None:
        """Freeze parts: no gradient, so no update, and BatchNorm's statistics as they are.

        A neck is frozen with its backbone only: a gradient has to pass it otherwise. `batchnorm`
        keeps the backbone's statistics while its weights train.
        """
        wanted = (backbone, neck and backbone, batchnorm)
        if not any(wanted) and not any(self._frozen):
            return
        self._frozen = wanted
        detector = self.detector
        detector.train()
        if backbone:
            detector.backbone.eval()
        elif batchnorm:
            for module in detector.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        if wanted[1]:
            detector.neck.eval()


@torch.no_grad()
def share_statistics(parts: Iterable[nn.Module]) -> None:
    """Give every rank the first one's floating-point buffers; each gathered those of its batches.

    What the first rank has is what is saved, so it is what all of them are to score.
    """
    buffers = [b for part in parts for b in part.buffers() if b.is_floating_point()]
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    torch.distributed.broadcast(flat, 0)
    parts_of_flat = torch.split(flat, [buffer.numel() for buffer in buffers])
    for buffer, values in zip(buffers, parts_of_flat, strict=True):
        buffer.copy_(values.view_as(buffer))


def scale_learning_rates(detector: Detector, optim: Optim) -> None:
    """Tell the optimiser, through `Detector.lr_scales`, how fast each layer of the backbone learns.

    The last layer learns at optim.backbone_lr times the rate of neck and head, and every layer
    before it at optim.layer_decay times the rate of the next (arXiv 2106.08254, section 3.2: there
    the head alone has the whole rate, which is optim.backbone_lr=optim.layer_decay here).
    """
    if optim.backbone_lr == 1 and optim.layer_decay == 1:
        return
    depths = detector.backbone.depths()
    last = max(depths.values())
    detector.scales = {
        f"backbone.{name}": optim.backbone_lr * optim.layer_decay ** (last - depth)
        for name, depth in depths.items()
    }


@torch.no_grad()
def measure_batchnorm(
    detector: Detector, samples: LabeledSamples, order: Order, image_size: int
) -> None:
    """Give BatchNorm of backbone and neck the statistics of the labeled pictures, in grey squares.

    What they were pretrained on (views, masked pictures, another size) has other statistics. Every
    rank measures the same pictures and gets the same numbers.
    """
    device = next(detector.parameters()).device
    count = min(MEASURED, len(samples))
    loader = Loader(
        samples, order, _Whole(image_size), seed=0, batch_size=min(_AT_ONCE, count),
        reading=samples.reading,
    )  # fmt: skip
    backbone = detector.backbone
    measured = nn.ModuleList([backbone, detector.neck])

    def run() -> None:
        batches = iter(loader)
        for _ in range(max(1, count // min(_AT_ONCE, count))):
            image = next(batches).views["image"].to(device)
            detector.neck(backbone(colour.normalise(image, backbone.mean, backbone.std)))

    try:
        with evaluating(measured):
            measure_statistics(measured, run)
    finally:
        loader.close()


@dataclass(frozen=True)
class _Whole:
    """A whole picture in a grey square, so that all are of one size (evaluation has less grey)."""

    image_size: int

    def __call__(self, picture: Picture, generator: np.random.Generator) -> Arrays:
        return {"image": letterboxed(picture, (self.image_size, self.image_size))[0]}
