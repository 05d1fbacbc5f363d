"""Bytes -> uint8, RGB unless more is asked for: every odd picture format has one defined answer.

What: `open_picture` reads a header and checks it; `Picture.cut` decodes once, no larger than the
crops need, and gives uint8 crops. Why so: most of a worker's time is decoding, and a JPEG can be
decoded at 1/2, 1/4 or 1/8 of its size for a fraction of the cost (the scaled inverse DCT of
libjpeg, Pillow's `draft`).

Coordinates are upright: the EXIF orientation has been applied, exactly once, to the size, to the
boxes and to the pixels.

The defined answers, all of them RGB uint8:

- Gray, 1-bit, palette, CMYK, YCbCr, LAB: Pillow's conversion.
- Alpha, and a palette or colour that is declared transparent: composed over mid-grey (128), so
  that what lies hidden under transparent pixels is never learnt from.
- 16-bit gray (PNG, TIFF, PGM, JPEG 2000): divided by 257 and rounded, so that 65535 is 255; a
  TIFF of 9 to 15 bits by its own white. 16-bit colour: the high byte, which is what Pillow reads
  (at most one level away from division by 257).
- 32-bit and signed integers: as 16-bit gray where every value lies in 0..65535, else stretched
  from the smallest value to the largest.
- Float: stretched from the smallest finite value to the largest. A constant picture, and pixels
  that are not finite, are mid-grey (128). A picture without one finite value is refused.
- Animations, multi-page and multi-picture files: the first frame.
- More bands than Pillow has a mode for: as a `Reading` states (groundwork/data/bands.py), which
  also chooses bands, and the values that become 0 and 255, of any other picture. Of bands that
  are not three, a picture is uint8 of as many channels.
- EXIF that cannot be read, or an orientation outside 1..8: the picture is taken as upright.

Pictures of `max_pixels` or more are refused from the header. Pillow's own limit
(Image.MAX_IMAGE_PIXELS) is neither relied upon nor touched, since it is one setting for the whole
process: the formats' readers are called directly, as Image.open does, without its check. That
also keeps the formats to the list below, without those that start other programs (EPS) or that
any bytes could pass for (TGA).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import (  # noqa: F401 (importing a plugin registers its format)
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from groundwork.data.bands import GDAL_NODATA, MID_GREY, BandFile, is_tiff, levels_of, nodata_of
from groundwork.data.reading import PLAIN, Reading
from groundwork.data.resize import Box, cut_boxes
from groundwork.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "PPM")

Stored = ImageFile.ImageFile | BandFile
Decoded = tuple[Image.Image, ...]  # RGB each: three channels, and three more, the last one repeated
Result = TypeVar("Result")

_DRAFT_SCALES = (8, 4, 2)  # what libjpeg's scaled inverse DCT offers through Pillow
_BITS_PER_SAMPLE = 258  # TIFF 6.0, section 8
_SAMPLES_PER_PIXEL, _PLANES, _SEPARATE = 277, 284, 2
_SAMPLE_FORMAT, _UNSIGNED, _SIGNED = 339, 1, 2
_BANDS_A_PIXEL = 16  # max_pixels counts pixels of no more bands than these
_CODED = ("1", "P", "PA", "YCbCr", "LAB")  # whose numbers are no levels, or of one bit
_BANDED = ("L", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK")  # stored as bands of bytes
# A box may leave the picture by this many pixels: the rounding of a float32 coordinate.
_ROUNDING = 0.01

# EXIF 2.32, tag 274: rows and columns of the stored picture are exchanged from 5 up; then columns
# are reversed, or rows, or both, and the picture is upright.
_ORIENTATIONS = range(1, 9)
_EXCHANGED = 5
_COLUMNS_REVERSED = (2, 3, 6, 7)
_ROWS_REVERSED = (3, 4, 7, 8)


class Picture:
    """One picture: header read, pixels not yet. Coordinates are upright.

    `width` and `height` are the upright size in pixels, `channels` those of its pixels. Damage
    behind the header shows when the pixels are asked for: `cut` and `pixels` raise DataError too.
    `orientation` is what the file says of how it lies, 1 to 8 as in EXIF.
    """

    def __init__(
        self,
        data: bytes,
        image: Stored,
        orientation: int,
        reading: Reading,
        *,
        turned: bool = False,  # by the reader of the format, its size included
    ) -> None:
        self._data = data
        self._reading = reading
        self._fresh: Stored | None = image  # as the header left it, for one decode
        self.orientation = orientation
        self._turn = 1 if turned else orientation
        self._decoded: Decoded | None = None
        self._scale = 0  # the scale of _decoded: 1, 2, 4, 8
        self._drafts = isinstance(image, JpegImagePlugin.JpegImageFile)
        self._stored_size = image.size
        width, height = image.size
        self.width, self.height = (height, width) if self._turn >= _EXCHANGED else (width, height)
        self.channels = reading.channels

    @property
    def whole(self) -> Box:
        """All of the picture, as a box."""
        return 0.0, 0.0, float(self.width), float(self.height)

    def cut(self, boxes: Sequence[Box], size: tuple[int, int] | int) -> list[npt.NDArray[np.uint8]]:
        """Cut every box out and resize it: bilinear, antialiased; uint8, H W channels, writable.

        A box is (left, top, right, bottom) in upright pixels and may be fractional; `size` is
        (height, width) or a side. The picture is decoded once for all boxes, a JPEG at the
        smallest scale that still gives every box at least `size` pixels. Pixels that a box does
        not touch (in the scaled picture: pixels of that picture) have no part in its crop.

        Raises DataError for pixels that cannot be decoded, ValueError for a box outside the
        picture or without area.
        """
        height, width = (size, size) if isinstance(size, int) else size
        stored = [self._to_stored(self._checked(box)) for box in boxes]
        if self._turn >= _EXCHANGED:
            height, width = width, height
        scale = _draft_scale(stored, width, height) if self._drafts else 1
        scaled = [_divided(box, scale) for box in stored]
        parts = [cut_boxes(image, scaled, (width, height)) for image in self._decode(scale)]
        return [self._upright(self._joined(crops)) for crops in zip(*parts, strict=True)]

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Decode the whole upright picture: uint8, H W channels. Raises DataError."""
        return self._upright(self._joined([np.array(image) for image in self._decode(1)]))

    def digest(self, also: bytes = b"") -> bytes:
        """Return 16 bytes that tell this picture, as it is read, and `also`, from all others."""
        stated = b"%d %b %r " % (len(also), also, self._reading.mapping)
        found = hashlib.blake2b(stated, digest_size=16)
        found.update(self._data)
        return found.digest()

    def _joined(self, parts: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
        """Put channels side by side again, without those that fill the last image."""
        if self.channels == 3:
            return parts[0]
        return np.concatenate(parts, axis=2)[:, :, : self.channels]

    def _checked(self, box: Box) -> Box:
        left, top, right, bottom = (float(edge) for edge in box)
        inside = (
            min(left, top) >= -_ROUNDING
            and right <= self.width + _ROUNDING
            and bottom <= self.height + _ROUNDING
        )
        if not (inside and left < right and top < bottom):  # also true of NaN
            raise ValueError(
                f"The box {box} has no area or leaves the {self.width} x {self.height} picture."
            )
        return (
            max(left, 0.0),
            max(top, 0.0),
            min(right, float(self.width)),
            min(bottom, float(self.height)),
        )

    def _to_stored(self, box: Box) -> Box:
        """Turn an upright box back into the coordinates of the picture as it is stored."""
        left, top, right, bottom = box
        # The same edges, measured from the right and from the bottom of the upright picture.
        far_left, far_right = self.width - right, self.width - left
        far_top, far_bottom = self.height - bottom, self.height - top
        return {
            1: (left, top, right, bottom),
            2: (far_left, top, far_right, bottom),
            3: (far_left, far_top, far_right, far_bottom),
            4: (left, far_top, right, far_bottom),
            5: (top, left, bottom, right),
            6: (top, far_left, bottom, far_right),
            7: (far_top, far_left, far_bottom, far_right),
            8: (far_top, left, far_bottom, right),
        }[self._turn]

    def _upright(self, stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if self._turn >= _EXCHANGED:
            stored = stored.swapaxes(0, 1)
        if self._turn in _COLUMNS_REVERSED:
            stored = stored[:, ::-1]
        if self._turn in _ROWS_REVERSED:
            stored = stored[::-1]
        return np.ascontiguousarray(stored)

    def _decode(self, scale: int) -> Decoded:
        """Decode as stored, at 1/scale of the size (above 1: JPEG only)."""
        if self._decoded is None or self._scale != scale:
            image = self._fresh or _guard(lambda: _open(self._data, self._reading))
            self._fresh = None
            self._decoded = None  # so that two sizes of one picture are never held at once
            self._decoded = _guard(lambda: _decode(image, scale, self._reading))
            self._scale = scale
            self._check_decoded()
        return self._decoded

    def _check_decoded(self) -> None:
        assert self._decoded is not None
        width, height = self._stored_size
        expected = (-(-width // self._scale), -(-height // self._scale))
        if self._decoded[0].size != expected:
            shown = "{} x {}".format(*self._decoded[0].size)
            raise DataError(f"its header promises {width} x {height} pixels, it holds {shown}")


def open_picture(data: bytes, reading: Reading = PLAIN) -> Picture:
    """Read a picture's header.

    Raises DataError with the reason alone (no name: the caller knows it) for bytes that are no
    picture of a known format, and for a picture of `reading.max_pixels` or more, before it is
    decoded.
    """
    image = _guard(lambda: _open(data, reading))
    width, height = image.size
    if not (isinstance(width, int) and isinstance(height, int)):  # a damaged TIFF has anything
        raise DataError(f"its header says {width!r} x {height!r} pixels")
    if width < 1 or height < 1:
        raise DataError(f"its header says {width} x {height} pixels")
    if width * height >= reading.max_pixels:
        raise DataError(
            f"it has {width} x {height} pixels; fewer than {reading.max_pixels} (max_pixels) are "
            "allowed"
        )
    if isinstance(image, BandFile):
        if width * height * image.bands >= reading.max_pixels * _BANDS_A_PIXEL:
            raise DataError(
                f"it has {width} x {height} pixels of {image.bands} bands, which are all read: as "
                f"many numbers as {reading.max_pixels} pixels (max_pixels) of {_BANDS_A_PIXEL} "
                "bands are too many"
            )
        return Picture(data, image, image.orientation, reading)
    if image.format == "PNG" and "exif" not in image.info and b"eXIf" in data:
        _guard(image.load)  # PNG allows eXIf behind the pixels, where only decoding finds it
    turned = image.format == "TIFF"  # Pillow does it by itself
    return Picture(data, image, _orientation(image), reading, turned=turned)


def _open(data: bytes, reading: Reading) -> Stored:
    """Let the first format that knows these bytes read the header, as Image.open does."""
    if not is_tiff(data):
        image = _by_pillow(data)
        if reading.value_range is not None and _rescaled(image, data):
            raise DataError(
                f"Pillow rescales the more than 8 bits of this {image.format}, so that a range of "
                "stored values has no meaning: store it as TIFF"
            )
        return image
    # It tells of more bands than it has a mode for, picture by picture.
    logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)
    try:
        found = _by_pillow(data)
        assert isinstance(found, TiffImagePlugin.TiffImageFile)
        if not _wants_tifffile(found, reading):
            return found
        why = "Pillow does not give the stored numbers of this TIFF; tifffile does"
    except Exception as error:  # a mode that Pillow does not have, or damage
        why = f"Pillow cannot read this TIFF ({error}); tifffile might"
    return BandFile(data, why)


def _wants_tifffile(image: TiffImagePlugin.TiffImageFile, reading: Reading) -> bool:
    """Tell a TIFF of which Pillow gives less than is asked for, by what its header says."""
    if image.mode in _CODED:
        return False
    tags = image.tag_v2
    samples = int(tags.get(_SAMPLES_PER_PIXEL, 1))
    bits, form = (int(max(tags.get(tag, (1,)))) for tag in (_BITS_PER_SAMPLE, _SAMPLE_FORMAT))
    deep = bits > 8 or form != _UNSIGNED
    if tags.get(_PLANES, 1) == _SEPARATE and samples > 1:
        # Of bands that are stored one after the other Pillow may read the first alone.
        return deep or samples > len(image.getbands()) or reading.bands is not None
    if not reading.stated:
        return False
    if samples > 1:
        return deep or reading.bands is not None
    # Pillow takes 32 bits for signed and 8 for unsigned, whatever they are.
    return (bits, form) in ((32, _UNSIGNED), (8, _SIGNED))


def _rescaled(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Tell a picture, no TIFF, whose numbers are not those that Pillow gives.

    PNG of 16-bit colours: the high bytes. PPM and PGM: stretched to 8 or 16 bits. JPEG 2000 of
    more than 8 bits: shifted to 16, or to 8.
    """
    if image.format == "PNG":
        several = image.mode in ("RGB", "RGBA", "LA")
        return several and any("16B" in str(tile.args) for tile in image.tile)
    if image.format == "PPM":
        return any(tile.codec_name.startswith("ppm") for tile in image.tile)
    if image.format == "JPEG2000":
        # The first component's depth in the codestream's SIZ marker (ISO 15444-1, A.5.1).
        start = data.find(b"\xff\x4f\xff\x51")
        depth = data[start + 42] if 0 <= start < len(data) - 42 else 0
        return depth not in (7, 15) or (depth == 15 and not image.mode.startswith("I"))
    return False


@contextlib.contextmanager
def naming(picture: str) -> Iterator[None]:
    """Say in a DataError, whose reason names no picture, which `picture` it is about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"The picture {picture}: {error}.") from error


def _by_pillow(data: bytes) -> ImageFile.ImageFile:
    if not data:
        raise DataError("the file is empty (0 bytes)")
    prefix = data[:16]
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix)
        if isinstance(accepted, str):  # Pillow was built without this format
            raise DataError(accepted)
        if accepted:
            image: ImageFile.ImageFile = factory(io.BytesIO(data), "")
            return image
    raise DataError(f"not a picture ({', '.join(FORMATS)}): it begins with {prefix!r}")


def _guard(action: Callable[[], Result]) -> Result:
    """Turn whatever a damaged file makes Pillow raise into a DataError with a reason.

    Pillow's readers raise OSError, SyntaxError, ValueError, struct.error, IndexError, EOFError,
    zlib.error and more on damaged bytes, so that no shorter list of types would hold. Memory that
    ran out is the machine's fault, not the picture's, and passes through.
    """
    try:
        return action()
    except (DataError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no further reason"
        raise DataError(f"it cannot be decoded ({type(error).__name__}: {reason})") from error


def _orientation(image: ImageFile.ImageFile) -> int:
    # Pillow's getexif would decode a PNG that has none.
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1
    try:
        tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else image.getexif()
        value = tags.get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF: a defined answer, see above
        return 1
    return value if value in _ORIENTATIONS else 1


def _draft_scale(boxes: Sequence[Box], width: int, height: int) -> int:
    """Return the largest scale that leaves every box at least width x height pixels."""
    smallest = min(
        (
            min((right - left) / width, (bottom - top) / height)
            for left, top, right, bottom in boxes
        ),
        default=1.0,
    )
    return next((scale for scale in _DRAFT_SCALES if smallest >= scale), 1)


def _divided(box: Box, scale: int) -> Box:
    left, top, right, bottom = box
    return left / scale, top / scale, right / scale, bottom / scale


def _decode(image: Stored, scale: int, reading: Reading) -> Decoded:
    if isinstance(image, BandFile):
        return _images(levels_of(image.numbers(), reading, nodata=image.nodata, white=image.white))
    if scale > 1:
        # Rounded down, the size asked for makes Pillow choose this very scale.
        image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))
    return _by_rule(image, reading)


def _images(levels: npt.NDArray[np.uint8]) -> Decoded:
    """Let Pillow hold H W channels: three in an image, the last channel as often as it takes."""
    count = levels.shape[2]
    if count == 3:
        return (Image.fromarray(levels),)
    filled = np.pad(levels, ((0, 0), (0, 0), (0, -count % 3)), mode="edge")
    return tuple(
        Image.fromarray(np.ascontiguousarray(filled[:, :, start : start + 3]))
        for start in range(0, count, 3)
    )


def _by_rule(image: ImageFile.ImageFile, reading: Reading) -> Decoded:
    """Decode and convert by the rules of the module's docstring."""
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        nodata = _nodata(image) if reading.stated else None
        return _images(
            levels_of(np.asarray(image)[..., None], reading, nodata=nodata, white=_white(image))
        )
    if not reading.stated:
        return (_coloured(image),)
    if reading.bands is not None and image.mode in _BANDED:
        values = np.asarray(image)
        return _images(levels_of(values[..., None] if values.ndim == 2 else values, reading))
    if not image.has_transparency_data:
        return _images(levels_of(np.asarray(image.convert("RGB")), reading))
    # What is hidden under transparent pixels stays mid-grey, whatever the mapping.
    shown = np.asarray(image.convert("RGBA"))
    share = shown[..., 3:].astype(np.float32) / 255
    mapped = levels_of(shown[..., :3], reading) * share + MID_GREY * (1 - share)
    return _images(np.rint(mapped).astype(np.uint8))


def _coloured(image: ImageFile.ImageFile) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        return _over_grey(image.convert("RGBA"))
    return image.convert("RGB")


def _over_grey(image: Image.Image) -> Image.Image:
    opaque = Image.new("RGBA", image.size, (MID_GREY, MID_GREY, MID_GREY, 255))
    return Image.alpha_composite(opaque, image).convert("RGB")


def _nodata(image: ImageFile.ImageFile) -> float | None:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return nodata_of(image.tag_v2.get(GDAL_NODATA))
    return None


def _white(image: ImageFile.ImageFile) -> int:
    """Return what white is among a picture's integers: a TIFF of 9 to 15 bits has its own."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = int(image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0])
        return (1 << bits) - 1 if 8 < bits < 16 else 65535
    return 65535
