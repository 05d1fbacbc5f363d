"""Stored numbers -> bytes: which bands become which channels, and which values 0 and 255.

What: a `Reading` states how pictures are read. With nothing stated a format's own rules hold, as
groundwork.data.decode lists them. Why so: scenes of satellites and drones have more than three
bands, scanners and microscopes more than 8 bits, and of both only a person knows which of them
matter; a network sees what this mapping leaves.

- `bands`, numbers from 1 (GDAL's numbering): what becomes red, green and blue; of another number
  than three, the channels of a network that has as many. Transparency is then a band like another.
- `value_range`, low and high: stored values that become 0 and 255, what lies outside is clipped.
  Of a computed tomography in Hounsfield units, window centre less and plus half the window width.
- Where no range is stated, bytes stay and 16-bit values are divided by 257 (of 9 to 15 bits, by
  their own white); wider and signed integers count as 16 bits where the whole picture lies in
  0..65535, and all other numbers are stretched from the picture's smallest to its largest.
- What is not finite becomes mid-grey (128); once something is stated so does the picture's own "no
  data" (GDAL's TIFF tag), where all bands that are read have it.

TIFFs that Pillow has no mode for (four bands of 16 bits, eight of 32), or whose numbers it changes,
are read by tifffile (`pip install '.[tiff]'`); so are bands of any TIFF.
"""

from __future__ import annotations

import io
import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from groundwork.data.reading import Reading
from groundwork.errors import DataError

MID_GREY = 128

_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")  # the last two: BigTIFF
_ORIENTATION, GDAL_NODATA = 274, 42113  # tags

Levels = npt.NDArray[np.uint8]


def is_tiff(data: bytes) -> bool:
    """Tell a TIFF or BigTIFF by its first bytes."""
    return data[:4] in _TIFF


class BandFile:
    """A TIFF's first page by tifffile, as bands of numbers: header read, numbers not yet.

    `size` is width and height as they are stored, `bands` how many there are, `orientation` EXIF's.
    Raises DataError where tifffile is not installed, saying `why` it is wanted; what tifffile
    raises for damaged bytes passes through.
    """

    def __init__(self, data: bytes, why: str) -> None:
        try:
            import tifffile
        except ImportError as error:
            raise DataError(f"{why}: pip install tifffile imagecodecs") from error
        # It tells of every tag that it cannot make sense of, picture by picture.
        logging.getLogger("tifffile").setLevel(logging.CRITICAL)
        self._page: Any = tifffile.TiffFile(io.BytesIO(data)).pages.first
        self.size: tuple[int, int] = (self._page.imagewidth, self._page.imagelength)
        self.bands = int(self._page.samplesperpixel)
        found = self._tag(_ORIENTATION)
        self.orientation = found if found in range(1, 9) else 1

    @property
    def white(self) -> int:
        """What integers have for white: those of 9 to 15 bits their own."""
        bits = int(self._page.bitspersample)
        return (1 << bits) - 1 if 8 < bits < 16 else 65535

    @property
    def nodata(self) -> float | None:
        """The number that stands for no data."""
        return nodata_of(self._tag(GDAL_NODATA))

    def numbers(self) -> npt.NDArray[Any]:
        """Return the stored numbers, H W bands."""
        values: npt.NDArray[Any] = self._page.asarray()
        axes = self._page.axes
        if axes == "YX":
            values = values[..., None]
        elif axes == "SYX":
            values = values.transpose(1, 2, 0)
        elif axes != "YXS":
            raise DataError(f"its first page has the axes {axes}, not rows, columns and bands")
        return values

    def _tag(self, code: int) -> Any:
        tag = self._page.tags.get(code)
        return None if tag is None else tag.value


def write_bands(file: io.BytesIO, levels: Levels) -> None:
    """Write H W C as a TIFF of C bands, without loss. Raises DataError without tifffile."""
    try:
        import tifffile
    except ImportError as error:
        raise DataError(
            f"{levels.shape[2]} bands are written by tifffile: pip install tifffile imagecodecs"
        ) from error
    tifffile.imwrite(
        file, np.ascontiguousarray(levels if levels.shape[2] > 1 else levels[:, :, 0]),
        photometric="minisblack", planarconfig="contig" if levels.shape[2] > 1 else None,
        compression="zlib", metadata=None,
    )  # fmt: skip


def nodata_of(tag: Any) -> float | None:
    """Read GDAL's tag: a number as text. None where there is none."""
    try:
        return float(str(tag).strip("\x00 "))
    except ValueError:
        return None


def levels_of(
    values: npt.NDArray[Any],
    reading: Reading,
    *,
    nodata: float | None = None,
    white: int = 65535,
) -> Levels:
    """Bring numbers (H W bands) to bytes, H W `reading.channels`.

    `white` is what 16-bit values have for white. Raises DataError where a band that is asked for is
    not there, where there are neither one nor three bands and none is asked for, and for a picture
    without one finite number.
    """
    count = values.shape[2]
    if reading.bands is not None:
        if max(reading.bands) > count:
            raise DataError(f"band {max(reading.bands)} is asked for, and it has {count}")
        chosen = [band - 1 for band in reading.bands]
    elif count in (1, 3):
        chosen = list(range(count))
    else:
        raise DataError(
            f"it has {count} bands: say which of them are to be red, green and blue, as "
            "data.bands=[3,2,1] or --bands 3,2,1"
        )
    different = sorted(set(chosen))
    part = values[:, :, different]
    data = None
    if nodata is not None:
        with np.errstate(over="ignore"):  # a double in a picture of floats
            data = np.broadcast_to((part != nodata).any(axis=2, keepdims=True), part.shape)
        if not data.any():
            return np.full((*values.shape[:2], reading.channels), MID_GREY, np.uint8)
    levels = _levels(part, data, reading, white)
    return np.ascontiguousarray(
        np.broadcast_to(levels, (*levels.shape[:2], reading.channels))
        if len(chosen) == 1
        else levels[:, :, [different.index(band) for band in chosen]]
    )


def _levels(
    values: npt.NDArray[Any],
    data: npt.NDArray[np.bool_] | None,
    reading: Reading,
    white: int,
) -> Levels:
    known = _known(values, data)
    if reading.value_range is not None:
        low, high = reading.value_range
    elif values.dtype == np.uint8:
        low, high = 0.0, 255.0
    elif values.dtype == np.uint16 or (
        values.dtype.kind in "iu" and values.dtype.itemsize > 1 and _in_16_bits(values, known)
    ):
        low, high = 0.0, float(white)
    else:
        low, high = _ends(values, known)
        if low == high:
            return np.full(values.shape, MID_GREY, np.uint8)
    if values.dtype == np.uint8 and (low, high) == (0.0, 255.0) and known is None:
        return values
    if known is not None and not known.any():
        raise DataError("it holds no finite value")
    # Where the difference might leave float32's range or precision, in float64.
    numbers: Any = values if known is None else np.where(known, values, low)
    numbers = numbers.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    scaled = (numbers - low) * (255 / (high - low))
    levels: Levels = np.rint(scaled).clip(0, 255).astype(np.uint8)
    if known is not None:
        levels[~known] = MID_GREY
    return levels


def _known(
    values: npt.NDArray[Any], data: npt.NDArray[np.bool_] | None
) -> npt.NDArray[np.bool_] | None:
    """Return which numbers are finite and data; None: all are."""
    known = data
    if values.dtype.kind == "f":
        finite: npt.NDArray[np.bool_] = np.isfinite(values)
        known = finite if data is None else finite & data
    return None if known is None or known.all() else known


def _in_16_bits(values: npt.NDArray[Any], known: npt.NDArray[np.bool_] | None) -> bool:
    low, high = _ends(values, known)
    return low >= 0 and high <= 65535


def _ends(values: npt.NDArray[Any], known: npt.NDArray[np.bool_] | None) -> tuple[float, float]:
    chosen = values if known is None else values[known]
    if not chosen.size:
        raise DataError("it holds no finite value")
    return float(chosen.min()), float(chosen.max())
