"""How a pretrained part is handed over to fine-tuning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from finetune.detector import build_detector
from finetune.recipe import Optim
from finetune.training import measure_batchnorm, scale_learning_rates
from groundwork.data.labels import open_labeled
from groundwork.data.order import Order
from groundwork.optim import build_optimizer, set_learning_rate


def test_each_layer_learns_at_its_share_of_the_rate() -> None:
    detector = build_detector("yolo12n", 2)
    optim = Optim(lr=0.01, backbone_lr=0.5, layer_decay=0.9)
    scale_learning_rates(detector, optim)
    optimizer = build_optimizer(optim, detector)
    set_learning_rate(optimizer, 0.01)
    rate = {
        id(parameter): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    depths = detector.backbone.depths()
    last = max(depths.values())
    assert len(set(depths.values())) > 5
    for name, parameter in detector.backbone.named_parameters():
        expected = 0.01 * 0.5 * 0.9 ** (last - depths[name])
        assert rate[id(parameter)] == pytest.approx(expected), name
    for part in (detector.neck, detector.head):
        assert {rate[id(p)] for p in part.parameters() if p.requires_grad} == {0.01}


def test_batchnorm_of_backbone_and_neck_gets_the_statistics_of_the_pictures(labeled: Path) -> None:
    torch.manual_seed(0)
    detector = build_detector("yolo12n", 2).train()
    first = next(m for m in detector.backbone.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    samples = open_labeled(str(labeled), "train", cache=labeled, cache_bytes=10**6)
    order = Order(samples.shard_sizes, seed=0, window_shards=16)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    measure_batchnorm(detector, samples, order, 64)
    for name, value in detector.state_dict().items():
        moved = name.endswith(("running_mean", "running_var")) and not name.startswith("head.")
        assert torch.equal(value, before[name]) != moved, name
    assert not first.training and detector.backbone.training
    # What it then computes has mean 0 and deviation 1 behind every norm, by eval's own rule.
    seen: list[torch.Tensor] = []
    last = [module for module in detector.neck.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    assert last.running_mean is not None
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    measure_batchnorm(detector, samples, order, 64)
    values = torch.cat(seen)
    torch.testing.assert_close(last.running_mean, values.mean((0, 2, 3)), rtol=1e-2, atol=1e-2)
    samples.close()
