"""A backbone that sees visible cells alone: nothing of a hole, and nothing into a hole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from groundwork.backbones import build_backbone
from groundwork.backbones.contract import Backbone
from groundwork.backbones.yolo12 import AreaAttention
from groundwork.errors import UsageError
from pretext_tasks.visible import check_backbone, visible_only

BACKBONES = ("yolo12n", "timm/resnet18")  # the second has pooling, and no attention


@pytest.fixture(params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(request.param).to(memory_format=torch.channels_last).train()


def _blocks() -> Tensor:
    """Return bool 3 4 4, one picture of which hides a whole band."""
    hidden = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    hidden[0, 0] = True
    hidden[:, 3, 3] = False
    return hidden


def _pixels(blocks: Tensor, side: int) -> Tensor:
    return blocks.repeat_interleave(side, 1).repeat_interleave(side, 2).unsqueeze(1)


def test_hidden_cells_stay_empty_at_every_level(backbone: Backbone) -> None:
    hidden = _blocks()
    image = torch.rand(3, 3, 128, 128).masked_fill(_pixels(hidden, 32), 0)
    with visible_only(backbone, hidden):
        levels = backbone(image)
    for level, stride in zip(levels, (8, 16, 32), strict=True):
        cells = _pixels(hidden, 32 // stride)
        assert level.isfinite().all()
        assert (level * cells == 0).all()
        assert (level * ~cells).abs().amax(1, keepdim=True)[~cells].min() > 0


def test_with_nothing_hidden_it_is_the_backbone(backbone: Backbone) -> None:
    image = torch.rand(3, 3, 128, 128)
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    with visible_only(backbone, torch.zeros(3, 4, 4, dtype=torch.bool)):
        seen = backbone(image)
    moved = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.load_state_dict(state)
    plain = backbone(image)
    for one, other in zip(seen, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=3e-4)
    for name, value in backbone.state_dict().items():
        # The unbiased variance is of one number of cells: the statistics are the same.
        torch.testing.assert_close(moved[name], value, rtol=1e-4, atol=1e-5)


def test_running_statistics_are_of_visible_cells(backbone: Backbone) -> None:
    norm = next(module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d))
    norm.momentum = 1.0
    inputs: list[Tensor] = []
    first = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    hook = first.register_forward_hook(lambda _, __, out: inputs.append(out.detach()))
    hidden = _blocks()
    with visible_only(backbone, hidden):
        backbone(torch.rand(3, 3, 128, 128))
    hook.remove()
    [found] = inputs
    visible = ~_pixels(hidden, found.shape[2] // 4).squeeze(1)
    values = found.permute(0, 2, 3, 1)[visible]  # K C
    assert norm.running_mean is not None and norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, values.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, values.var(0), rtol=1e-4, atol=1e-5)


def test_attention_does_not_look_at_hidden_positions() -> None:
    torch.manual_seed(0)
    attention = AreaAttention(32, 1).eval()
    visible = torch.ones(1, 4, 4, dtype=torch.bool)
    visible[0, 0] = False
    x = torch.randn(1, 32, 4, 4)
    attention.visible = lambda height, width: visible
    attention.pe.bn.weight.data.zero_()  # the 7x7 look around is no attention
    before = attention(x)
    other = x.clone()
    other[:, :, 0] += 1
    torch.testing.assert_close(attention(other)[:, :, 1:], before[:, :, 1:])
    attention.visible = None
    assert not torch.allclose(attention(other)[:, :, 1:], attention(x)[:, :, 1:], atol=1e-4)


def test_everything_is_put_back_even_after_an_error(backbone: Backbone) -> None:
    with pytest.raises(RuntimeError), visible_only(backbone, _blocks()):
        backbone(torch.rand(3, 4, 128, 128))
    for module in backbone.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        if isinstance(module, AreaAttention):
            assert module.visible is None


def test_a_backbone_with_other_layers_is_refused() -> None:
    for name in ("yolo12n", "yolo12l", "timm/resnet18"):
        check_backbone(build_backbone(name))
    with pytest.raises(UsageError, match=r"knows convolution.*timm/convnext_atto has LayerNorm2d"):
        check_backbone(build_backbone("timm/convnext_atto"))
    with pytest.raises(UsageError, match=r"timm/resnetblur18 has BlurPool2d"):
        check_backbone(build_backbone("timm/resnetblur18"))


def test_squeeze_and_excitation_is_told() -> None:
    backbone = build_backbone("timm/mobilenetv3_small_050")
    with (
        pytest.raises(UsageError, match="feature map of 1 x 1"),
        visible_only(backbone, _blocks()),
    ):
        backbone(torch.rand(3, 3, 128, 128))
