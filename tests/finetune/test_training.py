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
from tests.commands import ROOT, run


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


RANK = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from torch import nn
from finetune.training import share_statistics
dist.init_process_group("gloo")
rank = dist.get_rank()
parts = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.BatchNorm2d(2)]
for part in parts:
    for buffer in part.buffers():
        buffer.fill_(5 + rank)
    for parameter in part.parameters():
        parameter.data.fill_(rank)
share_statistics(parts)
state = [part.state_dict() for part in parts]
torch.save(state, Path(sys.argv[1]) / f"{rank}.pt")
dist.barrier()  # a process that leaves first may take the other down inside torch
dist.destroy_process_group()
"""


@pytest.mark.dist
def test_every_rank_gets_the_statistics_of_the_first(tmp_path: Path) -> None:
    """What is scored is what is saved: each rank's BatchNorm has seen other pictures."""
    (tmp_path / "rank.py").write_text(RANK)
    done = run(2, ROOT, str(tmp_path), script=str(tmp_path / "rank.py"))
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for part in second:
        for name, value in part.items():
            statistics = name.endswith(("running_mean", "running_var"))
            expected = 5 if statistics else 6 if name.endswith("num_batches_tracked") else 1
            assert (value == expected).all(), name
    assert all((value == 5).all() for part in first for n, value in part.items() if "running" in n)
