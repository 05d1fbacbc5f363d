"""What groundwork.colour promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageFilter
from pydantic import ValidationError
from torch import Tensor
from torchvision.transforms import ColorJitter, GaussianBlur
from torchvision.transforms import functional as transforms

from groundwork import colour
from groundwork.colour import Colour
from groundwork.data.decode import open_picture

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = Colour(probability=0.0, grayscale=0.0, blur=0.0, solarise=0.0)
# SimCLR's appendix A and BYOL's table 6, without blur.
SIMCLR = Colour(
    probability=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grayscale=0.2, blur=0.0
)
BYOL = Colour(blur=0.0)


def pictures(number: int, side: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Draw N H W 3 that look like photographs: large soft areas, edges, some grain."""
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(number):
        coarse = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        soft = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        values = np.asarray(soft).astype(np.float32) * 0.7 + generator.uniform(0, 60)
        left, top = generator.integers(0, side // 2, 2)
        values[top : top + side // 3, left : left + side // 3] = generator.uniform(0, 255, 3)
        drawn.append((values + generator.normal(0, 6, values.shape)).clip(0, 255).astype(np.uint8))
    return np.stack(drawn)


def parameters_of(config: Colour, number: int, seed: int = 0) -> Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([colour.draw(config, generator) for _ in range(number)]))


def coloured(images: npt.NDArray[np.uint8], parameters: Tensor, **options: Any) -> Tensor:
    """Apply without normalisation: N 3 H W in 0..1."""
    return colour.apply(torch.from_numpy(images), parameters, (0, 0, 0), (1, 1, 1), **options)


# --- against torchvision -------------------------------------------------------------------------


def torchvisions(image: Tensor, config: Colour, generator: np.random.Generator) -> Tensor:
    """Play what `draw` draws from this generator through torchvision's own chain."""
    if generator.random() < config.probability:
        for operation in generator.permutation(4):
            strength = (config.brightness, config.contrast, config.saturation, config.hue)
            if operation == 3:
                turns = generator.uniform(-config.hue, config.hue)
                image = transforms.adjust_hue(image, turns)
                continue
            low, high = max(0.0, 1 - strength[operation]), 1 + strength[operation]
            adjust = (
                transforms.adjust_brightness,
                transforms.adjust_contrast,
                transforms.adjust_saturation,
            )[operation]
            image = adjust(image, generator.uniform(low, high))
    if generator.random() < config.grayscale:
        image = transforms.rgb_to_grayscale(image, num_output_channels=3)
    generator.random(), generator.random()  # blur, solarise
    return image


def both_chains(
    images: npt.NDArray[np.uint8], config: Colour, seed: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    ours = coloured(images, parameters_of(config, len(images), seed)).numpy()
    generator = np.random.default_rng(seed)
    theirs = [
        torchvisions(torch.from_numpy(image).permute(2, 0, 1), config, generator).numpy()
        for image in images
    ]
    return ours, np.stack(theirs).astype(np.float32) / 255


def assert_close_to_torchvision(images: npt.NDArray[np.uint8], config: Colour) -> None:
    ours, theirs = both_chains(images, config, seed=1)
    assert np.abs(ours.mean((0, 2, 3)) - theirs.mean((0, 2, 3))).max() < 0.01
    spread = ours.std((2, 3)).mean(0) / theirs.std((2, 3)).mean(0)  # in an image, by channel
    assert np.abs(spread - 1).max() < 0.1
    between = ours.mean((2, 3)).std(0) / theirs.mean((2, 3)).std(0)  # between images
    assert np.abs(between - 1).max() < 0.1
    # Draw by draw, the two are the same distortion.
    one, other = ours.mean((2, 3)).ravel(), theirs.mean((2, 3)).ravel()
    assert np.corrcoef(one, other)[0, 1] > 0.95


@pytest.mark.parametrize("config", [SIMCLR, BYOL], ids=["simclr", "byol"])
def test_drawn_pictures_come_out_as_from_torchvisions_chain(config: Colour) -> None:
    assert_close_to_torchvision(np.tile(pictures(60, 48), (5, 1, 1, 1)), config)


@pytest.mark.parametrize("config", [SIMCLR, BYOL], ids=["simclr", "byol"])
@pytest.mark.parametrize(
    "folder", ["medical-bccd/JPEGImages", "aerial-hrplanes"], ids=["cells", "aerial"]
)
def test_photographs_come_out_as_from_torchvisions_chain(
    folder: str, config: Colour, shared_data: Path
) -> None:
    names = sorted((shared_data / folder).rglob("*.jpg"))[:20]
    cuts = [
        open_picture(name.read_bytes()).cut([(0, 0, 320, 240), (100, 100, 300, 300)], 48)
        for name in names
    ]
    images = np.tile(np.stack([cut for pair in cuts for cut in pair]), (4, 1, 1, 1))
    assert_close_to_torchvision(images, config)


def test_one_operation_alone_is_torchvisions_where_nothing_is_clamped() -> None:
    image = np.clip(pictures(1, 32, seed=3), 90, 150)
    tensor = torch.from_numpy(image[0]).permute(2, 0, 1).float() / 255
    none = {"probability": 1.0, "grayscale": 0.0, "blur": 0.0}
    nothing = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    for name in ("brightness", "contrast", "saturation"):
        config = Colour.model_validate(none | nothing | {name: 0.4})
        generator = np.random.default_rng(5)
        expected = torchvisions(tensor, config, generator)
        actual = coloured(image, parameters_of(config, 1, seed=5))[0]
        assert (actual - expected).abs().max() < 2e-4, name
        assert (actual - tensor).abs().max() > 0.01, name  # and something happened
    grey = Colour(probability=0.0, grayscale=1.0, blur=0.0)
    expected = transforms.rgb_to_grayscale(tensor, 3)
    assert (coloured(image, parameters_of(grey, 1))[0] - expected).abs().max() < 2e-4


def test_factors_are_drawn_from_colour_jitters_ranges() -> None:
    jitter = ColorJitter(brightness=0.8)
    config = Colour(
        probability=1.0, brightness=0.8, contrast=0, saturation=0, hue=0, grayscale=0, blur=0
    )
    factors = parameters_of(config, 4000)[:, 0]  # A is factor times the identity
    low, high = jitter.brightness
    assert low <= factors.min() < low + 0.02
    assert high - 0.02 < factors.max() <= high
    assert abs(float(factors.mean()) - 1) < 0.03


# --- worked by hand ------------------------------------------------------------------------------


def parameters_by_hand(
    pixel: npt.NDArray[Any] | list[Any],
    mean: npt.NDArray[Any] | list[Any],
    sigma: float = 0,
    solarise: float = 0,
) -> Tensor:
    chain = np.concatenate([np.asarray(pixel), np.asarray(mean)], axis=1)
    return torch.tensor([[*chain.ravel(), sigma, solarise]], dtype=torch.float32)


def test_a_pixel_is_the_matrix_times_itself_plus_the_other_times_the_mean() -> None:
    images = np.array([[[[100, 0, 0], [0, 50, 200]]]], np.uint8)  # 1 1 2 3, mean 50 25 100
    pixel = [[0.5, 0, 0], [0, 1, 0.1], [0, 0, 0.25]]
    mean = [[0, 0, 0.2], [0, 0, 0], [1, 0, 0]]
    result = coloured(images, parameters_by_hand(pixel, mean))[0, :, 0] * 255
    # red: 50 + 20, 0 + 20; green: 0, 50 + 20; blue: 0 + 50, 50 + 50
    assert torch.allclose(result, torch.tensor([[70.0, 20.0], [0.0, 70.0], [50.0, 100.0]]))


def test_contrast_turns_about_the_mean_grey_of_the_picture_as_it_then_is() -> None:
    config = Colour(probability=1, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    chain = np.eye(3, 6)
    generator = np.random.default_rng(0)
    brighter = colour._jitter(0, config, chain, generator)
    factor = brighter[0, 0]
    contrasted = colour._jitter(1, config, brighter, generator)
    contrast = contrasted[0, 0] / factor
    # A picture of one colour (100, 0, 0): its grey after the brightness is 29.9 times the factor.
    colour_of_all = np.array([100.0, 0, 0, 100, 0, 0])
    expected = contrast * factor * np.array([100, 0, 0]) + (1 - contrast) * factor * 29.9
    assert np.allclose(contrasted @ colour_of_all, expected)


def test_a_contrast_factor_of_zero_gives_the_mean_grey() -> None:
    class Zero:
        def uniform(self, low: float, high: float) -> float:
            return low

    chain = colour._jitter(1, Colour(contrast=1.0), np.eye(3, 6), Zero())  # type: ignore[arg-type]
    result = coloured(pictures(1, 16), parameters_by_hand(chain[:, :3], chain[:, 3:]))
    grey = pictures(1, 16)[0].mean((0, 1)) @ [0.299, 0.587, 0.114] / 255
    assert np.allclose(result.numpy(), grey, atol=1e-5)


def test_hue_turns_red_to_green_to_blue_and_keeps_greys() -> None:
    exchanged = [[0, 0, 1], [1, 0, 0], [0, 1, 0]]  # red becomes green, green blue, blue red
    assert np.allclose(colour.hue_rotation(1 / 3), exchanged)
    for turns in (-0.3, 0.1, 0.5):
        rotation = colour.hue_rotation(turns)
        assert np.allclose(rotation @ [0.4, 0.4, 0.4], 0.4)
        assert np.allclose(rotation.sum(0), 1)  # the sum of the channels stays
        assert np.allclose(rotation @ colour.hue_rotation(-turns), np.eye(3))
    # HSV agrees on the direction: a small turn of red gains green, not blue.
    red = torch.tensor([200, 40, 40], dtype=torch.uint8).view(3, 1, 1)
    theirs = transforms.adjust_hue(red, 0.05).flatten().tolist()
    ours = colour.hue_rotation(0.05) @ [200, 40, 40]
    assert theirs[1] > theirs[2]
    assert ours[1] > ours[2]


def test_only_visible_pixels_count_for_the_mean_colour() -> None:
    images = np.zeros((2, 2, 2, 3), np.uint8)
    images[:, 0] = 200  # the upper row; the lower one is hidden in the first image
    visible = torch.tensor([[[True, True], [False, False]], [[True, True], [True, True]]])
    to_mean = parameters_by_hand(np.zeros((3, 3)), np.eye(3)).repeat(2, 1)
    result = coloured(images, to_mean, visible=visible) * 255
    assert torch.allclose(result[0], torch.tensor(200.0))
    assert torch.allclose(result[1], torch.tensor(100.0))
    nothing = torch.zeros(2, 2, 2, dtype=torch.bool)
    assert torch.equal(coloured(images, to_mean, visible=nothing), torch.zeros(2, 3, 2, 2))


def test_values_are_clamped_to_black_and_white_before_normalisation() -> None:
    images = pictures(1, 16)
    wild = parameters_by_hand(3 * np.eye(3), -1.2 * np.eye(3))
    plain = coloured(images, wild)
    assert [float(plain.min()), float(plain.max())] == [0, 1]
    result = colour.apply(torch.from_numpy(images), wild, MEAN, STD)
    for channel in range(3):
        expected = (plain[:, channel] - MEAN[channel]) / STD[channel]
        assert torch.allclose(result[:, channel], expected, atol=1e-5)


def test_nothing_drawn_is_normalisation_alone() -> None:
    images = torch.from_numpy(pictures(3, 32))
    result = colour.apply(images, parameters_of(PLAIN, 3), MEAN, STD)
    expected = transforms.normalize(images.permute(0, 3, 1, 2).float() / 255, MEAN, STD)
    assert torch.allclose(result, expected, atol=1e-5)
    assert torch.allclose(colour.normalise(images, MEAN, STD), expected, atol=1e-5)


def test_solarise_inverts_from_one_half_up() -> None:
    images = np.array([[[[0, 100, 127], [128, 200, 255]]]], np.uint8)
    eye, nothing = np.eye(3), np.zeros((3, 3))
    result = coloured(images, parameters_by_hand(eye, nothing, solarise=1)) * 255
    assert torch.allclose(result[0, :, 0, 0], torch.tensor([0.0, 100.0, 127.0]), atol=1e-3)
    assert torch.allclose(result[0, :, 0, 1], torch.tensor([127.0, 55.0, 0.0]), atol=1e-3)
    normalised = colour.apply(
        torch.from_numpy(images), parameters_by_hand(eye, nothing, solarise=1), MEAN, STD
    )
    assert torch.allclose(normalised, transforms.normalize(result / 255, MEAN, STD), atol=1e-5)


# --- blur ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_torchvisions_gaussian_with_a_kernel_of_a_tenth(sigma: float) -> None:
    images = pictures(1, 224, seed=2)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    expected = GaussianBlur(23, sigma=(sigma, sigma))(tensor)
    actual = coloured(images, parameters_by_hand(np.eye(3), np.zeros((3, 3)), sigma))
    assert (actual - expected).abs().max() < 2e-3  # half a level
    if sigma >= 1:
        pillow = Image.fromarray(images[0]).filter(ImageFilter.GaussianBlur(sigma))
        theirs = torch.from_numpy(np.array(pillow)).permute(2, 0, 1) / 255
        assert (actual[0] - theirs).abs().mean() < 0.005


def test_blur_is_symmetric_and_keeps_the_mean() -> None:
    dot = np.zeros((1, 61, 61, 3), np.uint8)
    dot[0, 30, 30] = 255
    result = coloured(dot, parameters_by_hand(np.eye(3), np.zeros((3, 3)), 1.0))[0, 0]
    assert torch.allclose(result, result.flip(0), atol=1e-6)
    assert torch.allclose(result, result.flip(1), atol=1e-6)
    assert torch.allclose(result, result.T, atol=1e-6)
    assert abs(float(result.sum()) - 1) < 1e-5
    # exp(-1/2) of the centre at a distance of one sigma
    assert abs(float(result[30, 31] / result[30, 30]) - 0.6065) < 1e-3


def test_only_the_images_that_drew_it_are_blurred_each_with_its_own_sigma() -> None:
    images = pictures(20, 64)
    parameters = parameters_of(PLAIN, 20)
    parameters[3, 18], parameters[17, 18] = 0.8, 2.0
    plain = coloured(images, parameters_of(PLAIN, 20))
    result = coloured(images, parameters)
    for index in range(20):
        alone = coloured(images[index : index + 1], parameters[index : index + 1])
        assert torch.allclose(result[index : index + 1], alone, atol=1e-6)
        assert torch.equal(result[index], plain[index]) == (index not in (3, 17))


def test_the_way_taken_on_cuda_gives_the_same_as_the_one_on_the_cpu() -> None:
    """On CUDA all images go through blur and solarise, with the largest kernel; none may change."""
    config = Colour(probability=0.8, blur=0.5, solarise=0.3)
    images, parameters = pictures(24, 96), parameters_of(config, 24, seed=4)
    expected = colour.apply(torch.from_numpy(images), parameters, MEAN, STD)
    result = torch.empty_like(expected)
    colour._colour(torch.from_numpy(images), parameters, MEAN, STD, None, result)
    result = colour._blur(result, parameters[:, 18], colour._largest_radius(96, 96))
    colour._solarise(result, parameters[:, 19], MEAN, STD)
    assert torch.allclose(result, expected, atol=1e-5)


def test_a_picture_too_small_for_a_kernel_is_not_blurred() -> None:
    images = pictures(1, 16)
    result = coloured(images, parameters_by_hand(np.eye(3), np.zeros((3, 3)), 2.0))
    assert torch.allclose(result * 255, torch.from_numpy(images).permute(0, 3, 1, 2).float())


# --- draws, shapes, types ------------------------------------------------------------------------


def test_probabilities_are_kept() -> None:
    config = Colour(probability=0.8, grayscale=0.2, blur=0.3, blur_sigma=(0.5, 1.5), solarise=0.1)
    parameters = parameters_of(config, 4000).numpy()
    chain = parameters[:, :18].reshape(-1, 3, 6)
    grey = np.abs(chain - chain[:, :1]).max((1, 2)) == 0
    assert abs(grey.mean() - 0.2) < 0.03
    untouched = np.abs(chain[~grey] - np.eye(3, 6)).max((1, 2)) < 1e-6
    assert abs(untouched.mean() - 0.2) < 0.03
    sigma = parameters[:, 18]
    assert abs((sigma > 0).mean() - 0.3) < 0.03
    assert sigma[sigma > 0].min() >= 0.5
    assert sigma.max() <= 1.5
    assert abs((parameters[:, 19] == 1).mean() - 0.1) < 0.02


def test_the_generator_alone_decides() -> None:
    assert torch.equal(parameters_of(SIMCLR, 5, seed=9), parameters_of(SIMCLR, 5, seed=9))
    assert not torch.equal(parameters_of(SIMCLR, 5, seed=9), parameters_of(SIMCLR, 5, seed=8))
    drawn = colour.draw(SIMCLR, np.random.default_rng(0))
    assert drawn.dtype == np.float32
    assert drawn.shape == (colour.PARAMETERS,)


def test_every_order_of_the_four_operations_is_drawn() -> None:
    class Recorder(np.random.Generator):
        orders: ClassVar[set[tuple[int, ...]]] = set()

        def permutation(self, x: Any, axis: int = 0) -> Any:
            order = super().permutation(x, axis)
            self.orders.add(tuple(order.tolist()))
            return order

    generator = Recorder(np.random.PCG64(0))
    for _ in range(400):
        colour.draw(SIMCLR, generator)
    assert len(generator.orders) == 24


def test_the_result_is_contiguous_float32_and_leaves_its_input_alone() -> None:
    images = torch.from_numpy(pictures(9, 32))
    parameters = parameters_of(Colour(solarise=0.5), 9)
    before = images.clone(), parameters.clone()
    for result in (
        colour.apply(images, parameters, MEAN, STD),
        colour.normalise(images, MEAN, STD),
    ):
        assert result.shape == (9, 3, 32, 32)
        assert result.dtype == torch.float32
        assert result.is_contiguous()
    assert torch.equal(images, before[0])
    assert torch.equal(parameters, before[1])


def test_autocast_does_not_cost_precision() -> None:
    images = torch.from_numpy(pictures(4, 64))
    parameters = parameters_of(Colour(blur=1.0), 4)
    expected = colour.apply(images, parameters, MEAN, STD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(colour.apply(images, parameters, MEAN, STD), expected)


def test_other_types_and_shapes_are_refused() -> None:
    images = torch.from_numpy(pictures(2, 32))
    parameters = parameters_of(PLAIN, 2)
    with pytest.raises(ValueError, match="uint8"):
        colour.apply(images.float(), parameters, MEAN, STD)
    with pytest.raises(ValueError, match="N H W 3"):
        colour.normalise(images.permute(0, 3, 1, 2), MEAN, STD)
    with pytest.raises(ValueError, match="2 x 20"):
        colour.apply(images, parameters[:1], MEAN, STD)


@pytest.mark.parametrize(
    "values",
    [
        {"probability": 1.1},
        {"hue": 0.6},
        {"brightness": -0.1},
        {"blur_sigma": (2.0, 0.1)},
        {"blur_sigma": (0.0, 1.0)},
        {"sharpness": 0.1},
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Colour.model_validate(values)


@pytest.mark.gpu
def test_nothing_waits_for_a_cuda_device() -> None:
    images, parameters = torch.from_numpy(pictures(8, 96)), parameters_of(Colour(solarise=0.3), 8)
    expected = colour.apply(images, parameters, MEAN, STD)
    images, parameters = images.cuda(), parameters.cuda()
    colour.apply(images, parameters, MEAN, STD)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = colour.apply(images, parameters, MEAN, STD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(result.cpu(), expected, atol=2e-2)  # TF32


def test_channels_beyond_three_are_greys_of_their_own() -> None:
    """Each further channel must come out as a grey picture of it would, and RGB as without them."""
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (6, 24, 32, 5), dtype=np.uint8))
    config = BYOL.model_copy(update={"probability": 1.0, "solarise": 0.5, "grayscale": 0.3})
    drawn = torch.from_numpy(np.stack([colour.draw(config, generator) for _ in range(6)]))
    mean, std = (0.5, 0.4, 0.3, 0.2, 0.1), (0.2, 0.3, 0.4, 0.5, 0.6)
    found = colour.apply(images, drawn, mean, std)
    assert found.shape == (6, 5, 24, 32)
    expected = colour.apply(images[..., :3].contiguous(), drawn, mean[:3], std[:3])
    assert torch.allclose(found[:, :3], expected, atol=1e-5)
    for channel in (3, 4):
        grey = images[..., channel : channel + 1].expand(-1, -1, -1, 3).contiguous()
        alone = colour.apply(grey, drawn, (mean[channel],) * 3, (std[channel],) * 3)
        assert torch.allclose(found[:, channel], alone[:, 0], atol=1e-4)
    one = colour.apply(images[..., :1].contiguous(), drawn, mean[:1], std[:1])
    grey = images[..., :1].expand(-1, -1, -1, 3).contiguous()
    same = colour.apply(grey, drawn, (mean[0],) * 3, (std[0],) * 3)
    assert torch.allclose(one[:, 0], same[:, 0], atol=1e-4)
