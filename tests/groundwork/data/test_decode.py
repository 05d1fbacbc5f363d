"""What groundwork.data.decode promises."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from groundwork.data import decode
from groundwork.data.decode import Picture, open_picture
from groundwork.data.reading import MAX_PIXELS, Reading
from groundwork.errors import DataError

Pixels = npt.NDArray[np.uint8]


def saved(image: Image.Image, name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def pixels_of(image: Image.Image, name: str, **options: Any) -> Pixels:
    return open_picture(saved(image, name, **options)).pixels()


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def mean_difference(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one.astype(np.float32) - other.astype(np.float32)).mean())


# --- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PNG", "TIFF", "JPEG2000"])
def test_sixteen_bit_gray_is_divided_by_257(name: str) -> None:
    values = np.array([[0, 128, 129, 257], [32768, 65535, 65406, 65407]], np.uint16)
    pixels = pixels_of(Image.fromarray(values), name)
    assert pixels.shape == (2, 4, 3)
    # 128/257 = 0.498, 129/257 = 0.502, 32768/257 = 127.502, 65406/257 = 254.498
    expected = [[0, 0, 1, 1], [128, 255, 254, 255]]
    for channel in range(3):
        assert pixels[:, :, channel].tolist() == expected


def test_sixteen_bit_big_endian_tiff_is_divided_by_257() -> None:
    stored = np.array([[0, 257 * 200, 65535]], ">u2")
    data = saved(Image.frombytes("I;16B", (3, 1), stored.tobytes()), "TIFF")
    assert data[:2] == b"MM"
    assert open_picture(data).pixels()[0, :, 0].tolist() == [0, 200, 255]


def test_sixteen_bit_colour_png_is_within_a_level_of_division_by_257() -> None:
    values = np.array([[[0, 40000, 65535], [1000, 257, 30000]]], ">u2")
    pixels = open_picture(_png(2, 1, 16, 2, b"\0" + values.tobytes())).pixels()
    assert np.abs(pixels - values.astype(np.float64) / 257).max() <= 1


def test_twelve_bit_tiff_has_4095_as_white() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[258] = 12
    # Two 12-bit values of three half bytes: 0xFFF (white) and 0x800 (2048 / 4095 * 255 = 127.5).
    data = saved(Image.new("I;16", (2, 1)), "TIFF", compression=None)
    entry = data.index(b"\x02\x01\x03\x00\x01\x00\x00\x00\x10\x00")
    offset = TiffImagePlugin.TiffImageFile(io.BytesIO(data)).tag_v2[273][0]
    twelve = bytearray(data)
    twelve[entry + 8] = 12
    twelve[offset : offset + 3] = b"\xff\xf8\x00"
    assert open_picture(bytes(twelve)).pixels()[0, :, 0].tolist() == [255, 128]


def test_integers_beyond_sixteen_bits_are_stretched() -> None:
    values = np.array([[-1000, 0, 1000, 3000]], np.int32)
    # (v + 1000) / 4000 * 255 = 0, 63.75, 127.5, 255
    assert pixels_of(Image.fromarray(values), "TIFF")[0, :, 0].tolist() == [0, 64, 128, 255]
    within = np.array([[0, 257, 65535]], np.int32)
    assert pixels_of(Image.fromarray(within), "TIFF")[0, :, 0].tolist() == [0, 1, 255]


def test_float_tiff_is_stretched_between_its_finite_values() -> None:
    values = np.array([[-1.0, 0.0, 3.0, np.nan, np.inf]], np.float32)
    pixels = pixels_of(Image.fromarray(values), "TIFF")
    # (v + 1) / 4 * 255 = 0, 63.75, 255; what is not finite is mid-grey
    assert pixels[0, :, 1].tolist() == [0, 64, 255, 128, 128]


def test_float_tiff_of_the_widest_range_does_not_overflow() -> None:
    values = np.array([[-3.4e38, 0.0, 3.4e38]], np.float32)
    assert pixels_of(Image.fromarray(values), "TIFF")[0, :, 0].tolist() == [0, 128, 255]


def test_constant_float_tiff_is_mid_grey_and_one_without_a_finite_value_is_refused() -> None:
    constant = Image.fromarray(np.full((2, 2), 7.5, np.float32))
    assert pixels_of(constant, "TIFF").tolist() == [[[128] * 3] * 2] * 2
    nothing = Image.fromarray(np.full((2, 2), np.nan, np.float32))
    with pytest.raises(DataError, match="no finite value"):
        pixels_of(nothing, "TIFF")


def test_gray_and_one_bit_become_three_equal_channels() -> None:
    gray = Image.fromarray(np.array([[0, 100, 255]], np.uint8))
    assert pixels_of(gray, "PNG")[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]
    assert pixels_of(gray.point(lambda v: 255 * (v > 50), "1"), "PNG")[0].tolist() == [
        [0] * 3,
        [255] * 3,
        [255] * 3,
    ]


def test_gray_jpeg_is_gray() -> None:
    pixels = pixels_of(Image.new("L", (16, 16), 90), "JPEG")
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels.astype(int) - 90).max() <= 1


@pytest.mark.parametrize("name", ["JPEG", "TIFF"])
def test_cmyk_is_converted(name: str) -> None:
    # No ink but 50 % cyan: red is half, green and blue are full.
    pixels = pixels_of(Image.new("CMYK", (16, 16), (127, 0, 0, 0)), name)
    assert np.abs(pixels.mean((0, 1)) - [128, 255, 255]).max() <= 3


def test_palette_is_looked_up() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 0, 5, 5, 5])
    assert pixels_of(image, "PNG")[0].tolist() == [[10, 20, 30], [200, 100, 0], [5, 5, 5]]
    assert pixels_of(image, "BMP")[0].tolist() == [[10, 20, 30], [200, 100, 0], [5, 5, 5]]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])], ids=["index", "bytes"])
def test_transparent_palette_entries_are_mid_grey(transparency: Any) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 0, 5, 5, 5])
    pixels = pixels_of(image, "PNG", transparency=transparency)
    assert pixels[0].tolist() == [[10, 20, 30], [128, 128, 128], [5, 5, 5]]


def test_a_transparent_colour_of_an_rgb_png_is_mid_grey() -> None:
    image = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8))
    pixels = pixels_of(image, "PNG", transparency=(255, 0, 0))
    assert pixels[0].tolist() == [[128, 128, 128], [0, 255, 0]]


@pytest.mark.parametrize("name", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_composed_over_mid_grey(name: str) -> None:
    values = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [255, 0, 0, 51]]], np.uint8)
    options = {"lossless": True, "exact": True} if name == "WEBP" else {}
    pixels = pixels_of(Image.fromarray(values), name, **options)
    # A fifth red over four fifths of 128: 0.2 * 255 + 0.8 * 128 = 153.4, and 102.4
    assert pixels[0, 0].tolist() == [128, 128, 128]
    assert pixels[0, 1].tolist() == [255, 0, 0]
    assert np.abs(pixels[0, 2] - np.array([153.4, 102.4, 102.4])).max() <= 1


def test_gray_with_alpha_is_composed_over_mid_grey() -> None:
    image = Image.new("LA", (3, 1))
    for x, value in enumerate([(0, 0), (10, 255), (255, 51)]):
        image.putpixel((x, 0), value)
    pixels = pixels_of(image, "PNG")
    assert pixels[0, :2].tolist() == [[128] * 3, [10] * 3]
    assert np.abs(pixels[0, 2].astype(float) - 153.4).max() <= 1


def test_lab_is_converted() -> None:
    pixels = pixels_of(Image.new("LAB", (4, 4), (255, 128, 128)), "TIFF")
    assert pixels.mean() > 250  # L = 100, a = b = 0 is white


@pytest.mark.parametrize("name", ["GIF", "TIFF", "WEBP", "PNG", "AVIF", "MPO"])
def test_the_first_frame_is_read(name: str) -> None:
    first, second = Image.new("RGB", (16, 16), (200, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 200))
    pixels = pixels_of(first, name, save_all=True, append_images=[second])
    assert np.abs(pixels.mean((0, 1)) - [200, 0, 0]).max() <= 4


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "PPM"])
def test_every_format_gives_the_same_picture(name: str) -> None:
    image = smooth(64, 48)
    picture = open_picture(saved(image, name))
    assert (picture.width, picture.height) == (64, 48)
    pixels = picture.pixels()
    assert pixels.dtype == np.uint8
    assert pixels.shape == (48, 64, 3)
    limit = 6 if name == "GIF" else 3
    assert np.abs(pixels.mean((0, 1)) - np.asarray(image).mean((0, 1))).max() <= limit
    assert mean_difference(pixels, np.asarray(image)) <= 2 * limit


@pytest.mark.parametrize("name", ["JPEG", "PNG"])
def test_the_smallest_and_the_flattest_picture_can_be_cut(name: str) -> None:
    dot = open_picture(saved(Image.new("RGB", (1, 1), (9, 90, 200)), name))
    (crop,) = dot.cut([(0, 0, 1, 1)], 32)
    assert np.abs(crop.reshape(-1, 3).astype(int) - [9, 90, 200]).max() <= 3
    ramp = np.repeat(np.linspace(0, 255, 20000).astype(np.uint8)[None, :, None], 2, 0).repeat(3, 2)
    flat = open_picture(saved(Image.fromarray(ramp), name))
    assert (flat.width, flat.height) == (20000, 2)
    left, right = flat.cut([(0, 0, 10000, 2), (10000, 0, 20000, 2)], 32)
    assert abs(left.mean() - 63.75) <= 1.5
    assert abs(right.mean() - 191.25) <= 1.5


# --- orientation ---------------------------------------------------------------------------------

# A picture 3 wide and 2 high, upright:   a b c     and how each orientation stores it
#                                         d e f     (EXIF 2.32: where row 0 and column 0 lie).
UPRIGHT = ["abc", "def"]
STORED = {
    1: ["abc", "def"],
    2: ["cba", "fed"],
    3: ["fed", "cba"],
    4: ["def", "abc"],
    5: ["ad", "be", "cf"],
    6: ["cf", "be", "ad"],
    7: ["fc", "eb", "da"],
    8: ["da", "eb", "fc"],
}
GRAYS = {"a": 20, "b": 60, "c": 100, "d": 140, "e": 180, "f": 220}
BLOCK = 16  # one letter is a block of JPEG


def letters(rows: list[str]) -> Pixels:
    small = np.array([[GRAYS[letter] for letter in row] for row in rows], np.uint8)
    return small.repeat(BLOCK, 0).repeat(BLOCK, 1)[:, :, None].repeat(3, 2)


def turned(orientation: int, name: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"exif": exif}
    if name == "WEBP":
        options["lossless"] = True
    if name == "TIFF":
        options = {"tiffinfo": {0x0112: orientation}}
    return saved(Image.fromarray(letters(STORED[orientation])), name, **options)


def read_back(pixels: Pixels) -> list[str]:
    centres = pixels[BLOCK // 2 :: BLOCK, BLOCK // 2 :: BLOCK, 0].astype(int)
    return [
        "".join(min(GRAYS, key=lambda k: abs(GRAYS[k] - int(value))) for value in row)
        for row in centres
    ]


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_exactly_once(orientation: int, name: str) -> None:
    picture = open_picture(turned(orientation, name))
    assert (picture.width, picture.height) == (3 * BLOCK, 2 * BLOCK)
    assert read_back(picture.pixels()) == UPRIGHT


@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("letter", "abcdef")
def test_boxes_are_upright(letter: str, orientation: int, name: str) -> None:
    row = 0 if letter in UPRIGHT[0] else 1
    column = UPRIGHT[row].index(letter)
    box = (column * BLOCK, row * BLOCK, (column + 1) * BLOCK, (row + 1) * BLOCK)
    picture = open_picture(turned(orientation, name))
    for side in (16, 8, 2):  # a JPEG at full size, at a half, at an eighth
        (crop,) = picture.cut([box], side)
        assert np.abs(crop.astype(int) - GRAYS[letter]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_cut_of_the_whole_is_the_upright_picture(orientation: int) -> None:
    picture = open_picture(turned(orientation, "PNG"))
    (crop,) = picture.cut([(0, 0, picture.width, picture.height)], (2 * BLOCK, 3 * BLOCK))
    assert np.array_equal(crop, letters(UPRIGHT))
    (low,) = picture.cut([(0, 0, picture.width, picture.height)], (8, 12))
    assert read_back(low.repeat(4, 0).repeat(4, 1)) == UPRIGHT


def test_orientation_behind_the_pixels_of_a_png_is_found() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(letters(STORED[6])), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    length = int.from_bytes(data[start : start + 4], "big") + 12
    chunk = data[start : start + length]
    moved = data[:start] + data[start + length :]
    end = moved.index(b"IEND") - 4
    assert read_back(open_picture(moved[:end] + chunk + moved[end:]).pixels()) == UPRIGHT


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_a_picture_with_damaged_exif_is_upright(exif: bytes) -> None:
    data = saved(Image.fromarray(letters(UPRIGHT)), "JPEG", exif=exif)
    assert read_back(open_picture(data).pixels()) == UPRIGHT


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_impossible_orientation_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(letters(UPRIGHT)), "JPEG", exif=exif)
    assert read_back(open_picture(data).pixels()) == UPRIGHT


# --- cuts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_a_scaled_decode_agrees_with_the_full_one(
    scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = saved(smooth(640, 483), "JPEG", quality=92)
    boxes = [(3.0, 5.0, 3.0 + 40 * scale, 5.0 + 48 * scale), (33.5, 2.25, 640.0, 483.0)]
    drafted = open_picture(data)
    crops = drafted.cut(boxes, (48, 40))
    assert drafted._scale == scale
    monkeypatch.setattr(decode, "_DRAFT_SCALES", ())
    full = open_picture(data)
    for crop, expected in zip(crops, full.cut(boxes, (48, 40)), strict=True):
        assert crop.shape == expected.shape == (48, 40, 3)
        assert mean_difference(crop, expected) < 1.0
        assert np.abs(crop.astype(int) - expected).max() < 12
    assert full._scale == 1


def test_a_real_photograph_agrees_between_scaled_and_full_decode(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted((shared_data / "medical-bccd" / "JPEGImages").iterdir())[:3]
    for name in names:
        data = name.read_bytes()
        drafted = open_picture(data).cut([(0, 0, 640, 480)], 112)[0]
        with monkeypatch.context() as patch:
            patch.setattr(decode, "_DRAFT_SCALES", ())
            full = open_picture(data).cut([(0, 0, 640, 480)], 112)[0]
        assert mean_difference(drafted, full) < 2.0
        assert abs(float(drafted.mean()) - float(full.mean())) < 0.5


@pytest.mark.parametrize("box_side, side, scale", [(223, 224, 1), (447, 224, 1), (448, 224, 2)])
def test_the_scale_leaves_every_box_its_output_size(box_side: int, side: int, scale: int) -> None:
    picture = open_picture(saved(smooth(640, 480), "JPEG"))
    picture.cut([(0, 0, box_side, box_side), (0, 0, 480, 480)], side)
    assert picture._scale == scale


def test_an_odd_size_is_drafted_by_the_scale_that_was_chosen() -> None:
    for width, height in [(15, 31), (17, 9), (31, 8), (9, 16), (63, 65)]:
        picture = open_picture(saved(smooth(width, height), "JPEG"))
        for side in (1, 2, 4, 8):
            (crop,) = picture.cut([(0, 0, width, height)], side)
            assert crop.shape == (side, side, 3)


@pytest.mark.parametrize("side", [96, 48, 24, 12])
def test_a_drawn_square_is_where_the_box_says(side: int) -> None:
    """A white square of a quarter of the box stays that quarter, at every scale of decoding."""
    values = np.zeros((240, 320, 3), np.uint8)
    values[64:112, 96:144] = 255  # left 96, top 64, side 48
    data = saved(Image.fromarray(values), "JPEG", quality=95, subsampling=0)
    # The box is 96 wide and high; in it the square spans a quarter to three quarters.
    (crop,) = open_picture(data).cut([(72, 40, 168, 136)], side)
    weight = crop[:, :, 0].astype(np.float64) / 255
    axis = (np.arange(side) + 0.5) / side
    assert abs(weight.mean() - 0.25) < 0.01
    assert abs((weight.sum(0) * axis).sum() / weight.sum() - 0.5) < 0.005
    assert abs((weight.sum(1) * axis).sum() / weight.sum() - 0.5) < 0.005


def test_a_fractional_box_shifts_by_the_fraction() -> None:
    ramp = np.tile(np.arange(0, 256, 2, dtype=np.uint8)[None, :, None], (32, 1, 3))
    picture = open_picture(saved(Image.fromarray(ramp), "PNG"))
    (crop,) = picture.cut([(10.5, 4, 42.5, 20)], (16, 32))
    # Pixel x of the ramp is 2x; the box begins half a pixel on, so between 2x and 2(x + 1).
    assert np.abs(crop[8, 1:-1, 0].astype(float) - (2 * np.arange(11, 41) + 1)).max() <= 1


@pytest.mark.parametrize("name, side", [("PNG", 16), ("PNG", 64), ("PNG", 4), ("JPEG", 4)])
def test_nothing_beyond_the_box_bleeds_in(name: str, side: int) -> None:
    values = np.full((96, 96, 3), 255, np.uint8)
    values[32:64, 32:64] = 0
    (crop,) = open_picture(saved(Image.fromarray(values), name)).cut([(32, 32, 64, 64)], side)
    assert crop.max() <= 2


def test_crops_are_writable_and_of_the_size_asked_for() -> None:
    picture = open_picture(saved(smooth(64, 48), "JPEG"))
    crops = picture.cut([(0, 0, 64, 48), (1, 2, 30, 40)], (32, 96))
    assert [crop.shape for crop in crops] == [(32, 96, 3)] * 2
    for crop in crops:
        crop[0, 0] = 0  # raises on an array that Pillow still owns


def test_one_cut_decodes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    original = decode._decode

    def counted(image: Any, scale: int, reading: Reading) -> decode.Decoded:
        decoded.append(scale)
        return original(image, scale, reading)

    monkeypatch.setattr(decode, "_decode", counted)
    picture = open_picture(saved(smooth(640, 480), "JPEG"))
    picture.cut([(0, 0, 640, 480), (0, 0, 320, 240), (320, 240, 640, 480)], 96)
    assert decoded == [2]
    picture.cut([(0, 0, 320, 240)], 96)
    assert decoded == [2]


def test_a_later_cut_does_not_depend_on_an_earlier_one() -> None:
    data = saved(smooth(640, 480), "JPEG")
    picture = open_picture(data)
    picture.cut([(0, 0, 640, 480)], 32)
    (second,) = picture.cut([(100, 100, 200, 180)], 64)
    assert np.array_equal(second, open_picture(data).cut([(100, 100, 200, 180)], 64)[0])
    assert np.array_equal(picture.pixels(), open_picture(data).pixels())


@pytest.mark.parametrize(
    "box",
    [(-1, 0, 5, 5), (0, 0, 65, 5), (0, 0, 5, 49), (5, 5, 5, 9), (9, 5, 5, 9), (0, 0, np.nan, 5)],
)
def test_a_box_without_area_or_outside_is_refused(box: tuple[float, float, float, float]) -> None:
    picture = open_picture(saved(smooth(64, 48), "JPEG"))
    with pytest.raises(ValueError, match="64 x 48"):
        picture.cut([box], 8)


def test_a_rounding_error_beyond_the_edge_is_forgiven() -> None:
    picture = open_picture(saved(smooth(64, 48), "JPEG"))
    assert picture.cut([(-1e-4, 0, 64.0001, 48.00001)], 8)[0].shape == (8, 8, 3)


# --- damage --------------------------------------------------------------------------------------


def _truncated(make_jpeg: Callable[..., bytes]) -> dict[str, bytes]:
    jpeg, png = make_jpeg(1, 320, 240), saved(smooth(320, 240), "PNG")
    return {
        "empty": b"",
        "one byte": b"\xff",
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "jpeg header": jpeg[:20],
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "half a png": png[: len(png) // 2],
        "half a webp": (webp := saved(smooth(320, 240), "WEBP"))[: len(webp) // 2],
        "half a tiff": (tiff := saved(smooth(320, 240), "TIFF"))[: len(tiff) // 2],
        "half a gif": (gif := saved(smooth(320, 240), "GIF"))[: len(gif) // 2],
        "half an avif": (avif := saved(smooth(320, 240), "AVIF"))[: len(avif) // 2],
        "zeros": bytes(1000),
        "flipped png": png[:3000] + bytes(200) + png[3200:],
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Possibly corrupt")
def test_damaged_bytes_are_a_data_error_with_a_reason(make_jpeg: Callable[..., bytes]) -> None:
    for name, data in _truncated(make_jpeg).items():
        with pytest.raises(DataError) as caught:
            open_picture(data).pixels()
        assert len(str(caught.value)) > 10, name
        with pytest.raises(DataError):
            open_picture(data).cut([(0, 0, 320, 240)], 32)


def test_the_reason_says_what_is_wrong() -> None:
    with pytest.raises(DataError, match="empty"):
        open_picture(b"")
    with pytest.raises(DataError, match="DOCTYPE"):
        open_picture(b"<!DOCTYPE html><html></html>")


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it tolerates
def test_random_damage_gives_pixels_or_a_data_error(make_jpeg: Callable[..., bytes]) -> None:
    generator = np.random.default_rng(7)
    image = smooth(48, 40)
    files = [make_jpeg(3)] + [saved(image, name) for name in ("PNG", "WEBP", "TIFF", "GIF", "BMP")]
    refused = 0
    for round_ in range(300):
        data = bytearray(files[round_ % len(files)])
        for position in generator.integers(0, len(data), 8):
            data[position] = generator.integers(0, 256)
        try:
            assert open_picture(bytes(data), Reading(1_000_000)).pixels().dtype == np.uint8
        except DataError as error:
            refused += 1
            assert str(error)
    assert refused > 20


# --- bombs ---------------------------------------------------------------------------------------


def _chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def _png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(rows, 9))
        + _chunk(b"IEND", b"")
    )


def bomb(side: int) -> bytes:
    return _png(side, side, 1, 0, bytes((side // 8 + 1) * side))


def test_bombs_are_refused_from_the_header() -> None:
    # 10000 x 10000 is the limit itself, 14000 x 14000 beyond where Pillow's own open gives up, and
    # pytest turns Pillow's DecompressionBombWarning (9500 x 9500) into an error.
    for side in (10_000, 14_000, 60_000):
        with pytest.raises(DataError, match=f"{side} x {side}.*{MAX_PIXELS}"):
            open_picture(_png(side, side, 1, 0, b""))
    header = saved(Image.new("RGB", (8, 8)), "JPEG")
    frame = header.index(b"\xff\xc0")
    huge = header[: frame + 5] + b"\xff\xff\xff\xff" + header[frame + 9 :]
    with pytest.raises(DataError, match="65535 x 65535"):
        open_picture(huge)


def test_a_picture_under_the_limit_is_opened_without_a_warning() -> None:
    picture = open_picture(bomb(9_500))
    assert (picture.width, picture.height) == (9_500, 9_500)


def test_max_pixels_is_the_first_size_refused() -> None:
    data = saved(Image.new("RGB", (30, 20)), "PNG")
    assert open_picture(data, Reading(601)).width == 30
    with pytest.raises(DataError, match=r"30 x 20.*600"):
        open_picture(data, Reading(600))


def test_pillows_global_limit_is_left_alone() -> None:
    before = (Image.MAX_IMAGE_PIXELS, len(__import__("warnings").filters))
    with pytest.raises(DataError):
        open_picture(bomb(14_000))
    assert (Image.MAX_IMAGE_PIXELS, len(__import__("warnings").filters)) == before


def test_threads_do_not_disturb_each_other(make_jpeg: Callable[..., bytes]) -> None:
    good, bad, wrong = make_jpeg(5, 320, 240), bomb(14_000), []
    expected = open_picture(good).pixels()

    def work() -> None:
        for _ in range(20):
            if not np.array_equal(open_picture(good).pixels(), expected):
                wrong.append("pixels")
            try:
                open_picture(bad)
                wrong.append("bomb passed")
            except DataError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_refusing_bombs_takes_no_memory(tmp_path: Path) -> None:
    """Each kind of bomb in one fresh process: its peak grows by less than 300 MB over imports."""
    files = []
    webp = saved(Image.new("RGB", (8, 8)), "WEBP", lossless=True)
    canvas = 11_999 | 11_999 << 14  # VP8L: 14 bits each of width - 1 and height - 1
    gif = saved(Image.new("P", (8, 8)), "GIF")
    for name, data in {
        "10k.png": bomb(10_000),
        "14k.png": bomb(14_000),
        "12k.webp": webp[:21] + canvas.to_bytes(4, "little") + webp[25:],
        "12k.gif": gif[:6] + (12_000).to_bytes(2, "little") * 2 + gif[10:],
        "12k.tiff": saved(Image.new("1", (12_000, 12_000)), "TIFF", compression="group4"),
    }.items():
        path = tmp_path / name
        path.write_bytes(data)
        files.append(str(path))
    program = """
import resource, sys
from pathlib import Path
from groundwork.data.decode import open_picture
from groundwork.errors import DataError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
baseline = peak()
for name in sys.argv[1:]:
    try:
        open_picture(Path(name).read_bytes())
        sys.exit(name + " was not refused")
    except DataError:
        pass
    if peak() - baseline > 300:
        sys.exit(f"{name} took {peak() - baseline} MB")
sys.stdout.write(str(peak() - baseline))
"""
    root = Path(decode.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program, *files], capture_output=True, text=True, cwd=root
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 300


def test_picture_says_its_upright_size_before_decoding(make_jpeg: Callable[..., bytes]) -> None:
    picture = open_picture(make_jpeg(1, 320, 240)[:4000])  # cut short behind the header
    assert isinstance(picture, Picture)
    assert (picture.width, picture.height) == (320, 240)
    with pytest.raises(DataError, match="truncated"):
        picture.pixels()


def test_exif_is_applied_as_pillow_applies_it(make_jpeg: Callable[..., bytes]) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(Image.open(io.BytesIO(make_jpeg(2))), "JPEG", exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert np.array_equal(open_picture(data).pixels(), np.asarray(expected))


def test_a_size_that_is_no_number_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong byte of a TIFF's directory, and Pillow gives what it finds there as the width."""

    class Damaged:
        size = (b"\x40", 48)

    monkeypatch.setattr("groundwork.data.decode._open", lambda data, reading: Damaged())
    with pytest.raises(DataError, match="its header says b'@' x 48 pixels"):
        open_picture(b"II*\0")
