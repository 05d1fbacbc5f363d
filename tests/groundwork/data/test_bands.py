"""Bands and ranges of values: worked by hand, and through files of both stages."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from groundwork.data.bands import levels_of, write_bands
from groundwork.data.decode import open_picture
from groundwork.data.reading import PLAIN, Reading
from groundwork.data.samples import open_samples
from groundwork.errors import DataError, UsageError


def _tiff(values: npt.NDArray[Any], photometric: str = "minisblack", **more: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric=photometric, **more)
    return file.getvalue()


def _saved(image: Image.Image, form: str, **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


def _five(kind: str = "uint16") -> npt.NDArray[Any]:
    """Five bands, 40 x 60: band b is b * 1000 on the left half and 0 on the right."""
    values = np.zeros((40, 60, 5), kind)
    values[:, :30] = np.arange(1, 6) * 1000
    return values


def test_bands_are_chosen_and_a_range_is_stretched() -> None:
    values = np.array([[[0, 100, 200, 300]]], np.uint16)
    reading = Reading(bands=(4, 2, 2), value_range=(100, 300))
    assert levels_of(values, reading).tolist() == [[[255, 0, 0]]]
    reading = Reading(bands=(1, 3, 4), value_range=(-100, 300))  # (0 + 100) / 400 * 255 = 63.75
    assert levels_of(values, reading).tolist() == [[[64, 191, 255]]]
    # Without a range 16 bits are divided by 257, and bytes stay as they are.
    assert levels_of(values, Reading(bands=(4, 3, 2))).tolist() == [[[1, 1, 0]]]
    plain = np.array([[[7, 8, 9]]], np.uint8)
    assert levels_of(plain, Reading(bands=(3, 2, 1))).tolist() == [[[9, 8, 7]]]


def test_one_band_is_grey_and_what_is_no_number_is_mid_grey() -> None:
    values = np.array([[[np.nan], [0.0], [0.5], [2.0]]], np.float32)
    one = levels_of(values, Reading(value_range=(0, 1)))
    assert one[0, :, 0].tolist() == [128, 0, 128, 255] and (one == one[..., :1]).all()
    assert levels_of(values, PLAIN)[0, :, 0].tolist() == [128, 0, 64, 255]  # stretched from 0 to 2
    assert levels_of(values, PLAIN, nodata=2.0)[0, :, 0].tolist() == [128, 0, 255, 128]
    assert (levels_of(values, PLAIN, nodata=-1.8e308) == levels_of(values, PLAIN)).all()
    with pytest.raises(DataError, match="no finite value"):
        levels_of(np.full((2, 2, 1), np.nan, np.float32), PLAIN)


@pytest.mark.parametrize(
    ("form", "kind"),
    [("contig", "uint16"), ("separate", "uint16"), ("contig", "int16"), ("contig", "float32")],
)
@pytest.mark.parametrize("compression", [None, "lzw", "deflate"])
def test_a_tiff_of_five_bands_is_read(form: str, kind: str, compression: str | None) -> None:
    values = _five(kind)
    stored = values.transpose(2, 0, 1) if form == "separate" else values
    data = _tiff(stored, planarconfig=form, compression=compression)
    with pytest.raises(DataError, match=r"5 bands: say which .* data\.bands=\[3,2,1\]"):
        open_picture(data).pixels()
    picture = open_picture(data, Reading(bands=(5, 3, 1), value_range=(0, 5000)))
    assert (picture.width, picture.height) == (60, 40)
    pixels = picture.pixels()
    assert (pixels[:, :30] == [255, 153, 51]).all() and not pixels[:, 30:].any()
    [crop] = picture.cut([(0.0, 0.0, 30.0, 40.0)], 8)
    assert crop.shape == (8, 8, 3) and (crop == [255, 153, 51]).all()
    with pytest.raises(DataError, match="band 6 is asked for, and it has 5"):
        open_picture(data, Reading(bands=(6, 2, 1))).pixels()


def test_a_range_is_of_the_stored_numbers_whatever_the_file_calls_them() -> None:
    values = np.full((8, 9, 4), (1000, 2000, 3000, 0), np.uint16)
    reading = Reading(value_range=(0, 3000))
    data = _tiff(values[..., :3], "rgb", planarconfig="contig")
    assert (open_picture(data, reading).pixels() == [85, 170, 255]).all()
    planes = _tiff(values[..., :3].transpose(2, 0, 1), "rgb", planarconfig="separate")
    assert (open_picture(planes, reading).pixels() == [85, 170, 255]).all()
    assert (open_picture(planes).pixels() == [4, 8, 12]).all()  # of 257
    four = _tiff(values, "rgb", planarconfig="contig", extrasamples=["unspecified"])
    reading = Reading(bands=(4, 3, 1), value_range=(0, 3000))
    assert (open_picture(four, reading).pixels() == [0, 255, 85]).all()
    wide = _tiff(np.full((4, 4), 4_000_000_000, np.uint32))
    assert (open_picture(wide, Reading(value_range=(0, 4e9))).pixels() == 255).all()
    signed = _tiff(np.array([[-100, 0, 100]], np.int8))
    found = open_picture(signed, Reading(value_range=(-100, 100))).pixels()
    assert found[0, :, 0].tolist() == [0, 128, 255]


def test_12_bits_have_their_own_white_with_bands_as_without() -> None:
    values = np.full((8, 16), 2000, np.uint16)
    data = _tiff(values, bitspersample=12)
    assert (open_picture(data).pixels() == 125).all()  # 2000 / 4095 * 255
    assert (open_picture(data, Reading(bands=(1, 1, 1))).pixels() == 125).all()


def test_pictures_that_pillow_rescales_have_no_range() -> None:
    reading = Reading(value_range=(0, 3000))
    grey = Image.fromarray(np.full((16, 16), 3000, np.uint16))
    assert (open_picture(_saved(grey, "JPEG2000"), reading).pixels() == 255).all()
    pgm = b"P5 2 1 65535\n" + np.array([3000, 0], ">u2").tobytes()
    assert open_picture(pgm, reading).pixels()[0, :, 0].tolist() == [255, 0]
    for data in (
        b"P5 2 1 4095\n" + np.array([3000, 0], ">u2").tobytes(),
        b"P6 1 1 65535\n" + np.array([3000, 0, 0], ">u2").tobytes(),
    ):
        with pytest.raises(DataError, match=r"rescales .* PPM.* store it as TIFF"):
            open_picture(data, reading)
    bytes_ = _saved(Image.new("RGB", (16, 16), (50, 0, 0)), "JPEG2000", irreversible=False)
    assert (open_picture(bytes_, Reading(value_range=(0, 50))).pixels() == [255, 0, 0]).all()


@pytest.mark.parametrize("form", ["TIFF", "PNG"])
def test_a_palette_is_colours_with_bands_too(form: str) -> None:
    image = Image.new("RGB", (6, 6), (10, 20, 30)).quantize(4)
    data = _saved(image, form)
    assert (open_picture(data, Reading(bands=(3, 2, 1))).pixels() == [30, 20, 10]).all()


def test_what_is_transparent_stays_mid_grey_under_a_range() -> None:
    image = Image.fromarray(np.array([[[200, 0, 0, 0], [200, 50, 0, 255]]], np.uint8))
    pixels = open_picture(_saved(image, "PNG"), Reading(value_range=(0, 100))).pixels()
    assert pixels.tolist() == [[[128, 128, 128], [255, 128, 0]]]


@pytest.mark.parametrize("bands", [(1,), (1, 2, 3), (1, 2, 3, 1)])
def test_what_is_transparent_in_a_palette_stays_mid_grey(bands: tuple[int, ...]) -> None:
    colours = np.full((8, 8, 3), 90, np.uint8)
    colours[:, 4:] = 10
    palette = Image.fromarray(colours).quantize(4)
    hidden = palette.getpixel((6, 0))
    data = _saved(palette, "PNG", transparency=hidden)
    seen = open_picture(data, Reading(bands=bands, value_range=(0, 100))).pixels()
    assert seen.shape == (8, 8, len(bands))
    assert (seen[:, 4:] == 128).all()
    assert (abs(seen[:, :4].astype(int) - 230) <= 1).all()


def test_no_data_is_where_all_bands_that_are_read_have_it() -> None:
    nothing: dict[str, Any] = {"extratags": [(42113, "s", 0, "0", True)]}
    values = np.array([[[255, 0, 0], [0, 0, 0], [9, 9, 9]]], np.uint8)
    data = _tiff(values, "rgb", planarconfig="contig", **nothing)
    pixels = open_picture(data, Reading(bands=(1, 2, 3))).pixels()
    assert pixels.tolist() == [[[255, 0, 0], [128, 128, 128], [9, 9, 9]]]
    empty = _tiff(np.zeros((4, 4, 5), np.uint16), planarconfig="contig", **nothing)
    assert (open_picture(empty, Reading(bands=(3, 2, 1))).pixels() == 128).all()
    # One band, which Pillow reads: once something is stated.
    values = np.array([[-9999, 5, 10]], np.float32)
    data = _tiff(values, extratags=[(42113, "s", 0, "-9999", True)])
    found = open_picture(data, Reading(value_range=(0, 10))).pixels()
    assert found[0, :, 0].tolist() == [128, 128, 255]


def test_no_data_of_gdal_is_mid_grey() -> None:
    values = _five("int16")
    values[:20] = -9999
    data = _tiff(values, planarconfig="contig", extratags=[(42113, "s", 0, "-9999", True)])
    pixels = open_picture(data, Reading(bands=(5, 3, 1), value_range=(0, 5000))).pixels()
    assert (pixels[:20] == 128).all() and (pixels[20:, :30] == [255, 153, 51]).all()


def test_a_tiff_is_turned_upright_by_its_tag() -> None:
    data = _tiff(_five(), planarconfig="contig", extratags=[(274, "H", 1, 6, True)])
    picture = open_picture(data, Reading(bands=(5, 3, 1), value_range=(0, 5000)))
    assert (picture.width, picture.height) == (40, 60)
    pixels = picture.pixels()  # turned by a quarter to the right: the left half is on top
    assert (pixels[:30] == [255, 153, 51]).all() and not pixels[30:].any()


def test_three_bands_of_16_bits_need_nothing_stated() -> None:
    values = np.full((8, 9, 3), (257, 514, 65535), np.uint16)
    assert (open_picture(_tiff(values, planarconfig="contig")).pixels() == [1, 2, 255]).all()


def test_a_window_of_a_16_bit_grey_picture_is_all_that_is_seen() -> None:
    values = np.array([[1000, 1100, 1200, 40000]], np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    picture = open_picture(file.getvalue(), Reading(value_range=(1000, 1200)))
    assert picture.pixels()[0, :, 1].tolist() == [0, 128, 255, 255]


def test_bands_of_a_picture_with_transparency_are_bands() -> None:
    values = np.full((4, 4, 4), (10, 20, 30, 40), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    assert (open_picture(file.getvalue(), Reading(bands=(4, 1, 3))).pixels() == [40, 10, 30]).all()
    palette = io.BytesIO()
    Image.fromarray(values[..., :3]).quantize(4).save(palette, "PNG")
    pixels = open_picture(palette.getvalue(), Reading(bands=(3, 2, 1))).pixels()
    assert (pixels == [30, 20, 10]).all()


def test_a_jpeg_is_read_at_its_scale_and_mapped() -> None:
    file = io.BytesIO()
    Image.new("RGB", (160, 160), (50, 100, 150)).save(file, "JPEG", quality=95)
    picture = open_picture(file.getvalue(), Reading(bands=(3, 2, 1), value_range=(50, 150)))
    [crop] = picture.cut([(0.0, 0.0, 160.0, 160.0)], 20)
    assert np.abs(crop.astype(int) - [255, 128, 0]).max() <= 5


def test_a_png_of_16_bit_colours_has_too_few_bits_for_a_range() -> None:
    import cv2

    values = np.full((4, 5, 3), 3000, np.uint16)
    _, encoded = cv2.imencode(".png", values)
    data = encoded.tobytes()
    assert open_picture(data).pixels().max() == 3000 >> 8
    with pytest.raises(DataError, match=r"PNG.* store it as TIFF"):
        open_picture(data, Reading(value_range=(0, 4000)))


@pytest.mark.parametrize("damage", [200, 3000])
def test_a_damaged_tiff_is_a_data_error(damage: int) -> None:
    data = _tiff(_five(), planarconfig="contig", compression="deflate")
    with pytest.raises(DataError):
        open_picture(data[: len(data) - damage], Reading(bands=(3, 2, 1))).pixels()


def test_without_tifffile_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match=r"cannot read this TIFF .*pip install tifffile"):
        open_picture(_tiff(_five(), planarconfig="contig"))
    colours = _tiff(_five("uint8")[..., :3], "rgb", planarconfig="contig")
    assert open_picture(colours).width == 60
    with pytest.raises(DataError, match=r"tifffile does: pip install"):
        open_picture(colours, Reading(bands=(3, 2, 1)))


def test_a_mapping_that_says_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="numbers from 1 up"):
        Reading(bands=(0, 1, 2))
    with pytest.raises(UsageError, match="the smaller first"):
        Reading(value_range=(5, 5))


@pytest.fixture
def spectral(tmp_path: Path) -> Path:
    """A COCO set of five-band TIFFs, each with a square that only band 5 shows."""
    root = tmp_path / "spectral"
    (root / "annotations").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        images, boxes = [], []
        for number in range(4):
            values = generator.integers(900, 1100, (64, 64, 5), dtype=np.uint16)
            left, top = (int(place) for place in generator.integers(4, 36, 2))
            values[top : top + 20, left : left + 20, 4] = 4000
            name = f"{number}.tif"
            data = _tiff(values, planarconfig="contig")
            (root / "images" / split / name).write_bytes(data)
            images.append({"id": number, "file_name": name, "width": 64, "height": 64})
            boxes.append(
                {
                    "id": number, "image_id": number, "category_id": 1, "area": 400, "iscrowd": 0,
                    "bbox": [left, top, 20, 20],
                }
            )  # fmt: skip
        table = {
            "images": images, "annotations": boxes, "categories": [{"id": 1, "name": "field"}],
        }  # fmt: skip
        (root / "annotations" / f"{split}.json").write_text(json.dumps(table))
    return root


def test_bands_count_where_there_are_many() -> None:
    data = _tiff(np.zeros((40, 50, 32), np.uint8), planarconfig="contig")
    assert open_picture(data, Reading(max_pixels=4001, bands=(9,))).channels == 1
    with pytest.raises(DataError, match="50 x 40 pixels of 32 bands, which are all read"):
        open_picture(data, Reading(max_pixels=4000, bands=(9,)))


def test_nobody_is_told_of_every_picture_that_it_has_many_bands(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = _tiff(np.zeros((8, 8, 13), np.uint8), planarconfig="contig")
    assert open_picture(data, Reading(bands=(13,))).pixels().shape == (8, 8, 1)
    assert not caplog.records


@pytest.mark.parametrize("bands", [(1,), (5, 2), (1, 2, 3, 4), (5, 1, 4, 2, 3, 5, 1)])
def test_a_picture_has_as_many_channels_as_bands(bands: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (50, 70, 5), dtype=np.uint16)
    data = _tiff(values, planarconfig="contig")
    picture = open_picture(data, Reading(bands=bands))
    whole = picture.pixels()
    assert picture.channels == len(bands)
    assert whole.shape == (50, 70, len(bands))
    assert whole.flags.c_contiguous and whole.flags.writeable
    boxes = [(0.0, 0.0, 70.0, 50.0), (3.5, 4.25, 40.0, 30.0)]  # whole pixels, and not
    crops = picture.cut(boxes, 32)
    for channel, band in enumerate(bands):
        alone = open_picture(data, Reading(bands=(band, band, band)))
        assert (whole[..., channel] == alone.pixels()[..., 0]).all()
        for crop, same in zip(crops, alone.cut(boxes, 32), strict=True):
            assert crop.shape == (32, 32, len(bands))
            assert (crop[..., channel] == same[..., 0]).all()


def test_bands_of_common_pictures_may_be_one_or_four() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    data = _saved(Image.fromarray(colours), "PNG")
    assert (open_picture(data, Reading(bands=(4,))).pixels() == colours[..., 3:]).all()
    assert (open_picture(data, Reading(bands=(1, 2, 3, 4))).pixels() == colours).all()
    palette = Image.fromarray(colours[..., :3]).quantize(7)
    grey = open_picture(_saved(palette, "PNG"), Reading(bands=(2,))).pixels()
    assert (grey[..., 0] == np.asarray(palette.convert("RGB"))[..., 1]).all()


def test_what_is_written_as_bands_is_read_as_bands() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (31, 17, 6), dtype=np.uint8)
    file = io.BytesIO()
    write_bands(file, levels)
    read = open_picture(file.getvalue(), Reading(bands=(1, 2, 3, 4, 5, 6))).pixels()
    assert (read == levels).all()


@pytest.mark.slow
@pytest.mark.parametrize("bands", [(5, 2, 1), (1, 2, 3, 4, 5)])
def test_both_stages_read_bands_and_the_detector_remembers_them(
    spectral: Path, tmp_path: Path, bands: tuple[int, ...]
) -> None:
    from finetune.evaluate import main as evaluate
    from finetune.export import main as export
    from finetune.labels import main as labels
    from finetune.predict import main as predict
    from finetune.run import main as finetune
    from pretrain.pack import main as pack
    from pretrain.run import main as pretrain

    stated = [str(band) for band in bands]
    mapping = [f"data.bands=[{','.join(stated)}]", "data.value_range=[0,4000]"]
    common = ["threads=1", "data.workers=0", "batch_size=2", "image_size=64"]
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    pictures = spectral / "images" / "train"
    assert (
        pretrain(
            [
                "--task", "inpainting", "--out", str(run), f"data.train={pictures}",
                "budget.minutes=null", "budget.steps=1", "probe.labeled=null", "probe.pictures=32",
                f"probe.detection.data={spectral}", "probe.detection.steps=1",
                "probe.detection.image_size=64", *mapping, *common,
            ]
        )
        == 0
    )  # fmt: skip
    assert (
        finetune(
            [
                "--out", str(tuned), "--init", str(run / "pretrained.safetensors"),
                f"data.train={spectral}", "budget.epochs=null", "budget.steps=1", *mapping, *common,
            ]
        )
        == 0
    )  # fmt: skip
    detector = str(tuned / "detector.safetensors")
    assert evaluate([detector, f"data.val={spectral}", "data.workers=0"]) == 0
    out = tmp_path / "found"
    assert predict([detector, str(pictures), "--out", str(out), "--score", "0"]) == 0
    drawn = np.asarray(Image.open(next((out / "pictures").glob("*.jpg"))))
    assert bands[0] != 5 or drawn[..., 0].max() > 200  # the square of band 5 is red
    for form in ("torch_export", "ultralytics"):
        assert export([detector, "--format", form]) == 0
    arguments = [detector, f"data.val={spectral}", "data.workers=0"]
    # Five bands and none stated: pictures that cannot be read, or other channels than the detector.
    expected = 3 if len(bands) == 3 else 2
    assert evaluate([*arguments, "data.bands=null"]) == expected
    plain = [detector, str(pictures), "--out", str(tmp_path / "none"), "--plain"]
    assert predict(plain) == expected
    assert evaluate([*arguments, "data.bands=[1,2]"]) == 2
    # Tiles are written as they were read, and so are pictures that are no larger.
    values = np.full((40, 40, 5), 4000, np.uint16)
    (pictures / "small.tif").write_bytes(_tiff(values, planarconfig="contig"))
    assert (
        pack(
            [
                str(pictures), str(tmp_path / "tiles"), "--tiles", "48",
                "--bands", ",".join(stated),
                "--value-range", "0", "4000",
            ]
        )
        == 0
    )  # fmt: skip
    tiles = open_samples(str(tmp_path / "tiles"), cache=tmp_path, cache_bytes=10**9)
    assert len(tiles) == 4 * 4 + 1
    found = [tiles.read(0, index) for index in range(len(tiles))]
    packed = PLAIN if len(bands) == 3 else Reading(bands=tuple(range(1, len(bands) + 1)))
    pixels = {sample.key: open_picture(sample.image, packed).pixels() for sample in found}
    assert (pixels["small"] > 250).all()  # 4000 of 4000 in every band
    scenes = [seen for key, seen in pixels.items() if key != "small"]
    shown = bands.index(5)  # band 5 has the squares, and none else
    assert max(seen[..., shown].max() for seen in scenes) > 200
    assert max(seen[..., 2 - shown // 2].max() for seen in scenes) < 150
    sheet = tmp_path / "labels.png"
    assert (
        labels([str(spectral), "--out", str(sheet), "--bands", ",".join(stated)]) == 0
        and sheet.is_file()
    )
