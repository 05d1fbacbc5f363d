"""The decoders of inpainting: what each map is made of, and that every weight learns."""

from __future__ import annotations

import pytest
import torch

from groundwork.backbones.contract import Level, Pyramid
from pretext_tasks.inpainting_decoder import DECODERS

LEVELS = (Level(8, 16), Level(16, 24), Level(32, 40))
CELLS = {8: 192, 16: 192, 32: 192}


def _pyramid() -> Pyramid:
    torch.manual_seed(0)
    sides = {8: 8, 16: 4, 32: 2}
    return Pyramid(
        *(torch.randn(2, one.channels, sides[one.stride], sides[one.stride]) for one in LEVELS)
    )


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_maps_have_their_strides_and_every_weight_a_gradient(name: str) -> None:
    decoder = DECODERS[name](LEVELS, 32, CELLS)
    maps = decoder(_pyramid())
    assert {stride: tuple(one.shape) for stride, one in maps.items()} == {
        8: (2, 192, 8, 8), 16: (2, 192, 4, 4), 32: (2, 192, 2, 2),
    }  # fmt: skip
    sum(one.square().mean() for one in maps.values()).backward()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in decoder.parameters())
    assert list(DECODERS[name](LEVELS, 32, {8: 192})(_pyramid())) == [8]


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("sum", {8: {8, 16, 32}, 16: {16}, 32: {32}}),
        ("hierarchical", {8: {8, 16, 32}, 16: {16, 32}, 32: {32}}),
    ],
)
def test_what_a_map_is_made_of(name: str, seen: dict[int, set[int]]) -> None:
    decoder = DECODERS[name](LEVELS, 32, CELLS).eval()
    pyramid = _pyramid()
    before = decoder(pyramid)
    found: dict[int, set[int]] = {stride: set() for stride in CELLS}
    for number, level in enumerate(LEVELS):
        other = list(pyramid)
        other[number] = other[number] + torch.randn_like(other[number])
        for stride, one in decoder(Pyramid(*other)).items():
            if not torch.equal(one, before[stride]):
                found[stride].add(level.stride)
    assert found == seen


def test_what_comes_up_spreads_further_than_a_cell_of_its_level() -> None:
    """A change of one cell of C5 reaches cells of stride 8 beyond its own, through convolutions."""
    reached = {}
    for name in DECODERS:
        torch.manual_seed(0)
        decoder = DECODERS[name](LEVELS, 32, {8: 192}).eval()
        for block in list(decoder.modules()):
            for key, module in list(block.named_children()):
                if isinstance(module, torch.nn.GroupNorm):  # it sees the whole map
                    setattr(block, key, torch.nn.Identity())
        pyramid = Pyramid(
            torch.zeros(1, 16, 32, 32), torch.zeros(1, 24, 16, 16), torch.zeros(1, 40, 8, 8)
        )
        changed = pyramid.c5.clone()
        changed[:, :, 4, 4] = 1
        difference = decoder(Pyramid(pyramid.c3, pyramid.c4, changed))[8] - decoder(pyramid)[8]
        rows = difference.abs().sum((0, 1, 3)).nonzero().flatten()
        reached[name] = int(rows.min()), int(rows.max())
    # Cells 16 to 19 are those of C5's row 4; one 3x3 convolution reaches one further.
    assert reached["sum"] == (15, 20)
    # Hierarchical: one of C5 (4 cells), one of C4 (2), and one.
    assert reached["hierarchical"] == (16 - 4 - 2 - 1, 19 + 4 + 2 + 1)
