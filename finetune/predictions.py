"""What was found in pictures, as it is written: COCO's json, and the pictures with boxes drawn.

What: `Writer` for predictions.json and detections.json, `Drawings` for the folder of drawn
pictures. Why apart from the command: any detector's boxes can be written so, and neither needs more
memory for more pictures than their names take.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from finetune.detector import Detections
from finetune.draw import as_image, draw_boxes
from groundwork.data.decode import Picture
from groundwork.files import replacing

_LONGEST_JPEG = 65_500  # pixels: what libjpeg writes (JPEG_MAX_DIMENSION)
_DIGITS = 3  # of coordinates in json: a thousandth of a pixel


class Writer:
    """Writes the two json files of a folder, as pictures come; neither is there until `finish`.

    Its lists go into temporary files first, since there may be more boxes than memory holds.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.names = names
        self.pictures = 0
        self.boxes = 0
        self._stack = ExitStack()
        self._images, self._annotations, self._results = (
            self._stack.enter_context(
                tempfile.TemporaryFile("w+", encoding="ascii", dir=folder)  # noqa: SIM115 (it is)
            )
            for _ in range(3)
        )

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, name: str, width: int, height: int, found: Detections) -> int:
        """Add a picture and its boxes, in its pixels; return its id."""
        self.pictures += 1
        image = {"id": self.pictures, "file_name": name, "width": width, "height": height}
        _append(self._images, image, self.pictures == 1)
        for box, score, number in zip(*(part.tolist() for part in found), strict=True):
            self.boxes += 1
            left, top, right, bottom = box
            sides = [round(edge, _DIGITS) for edge in (left, top, right - left, bottom - top)]
            result = {
                "image_id": self.pictures,
                "category_id": number,
                "bbox": sides,
                "score": round(score, 6),
            }
            area = round((right - left) * (bottom - top), _DIGITS)
            _append(self._annotations, {"id": self.boxes, **result, "area": area}, self.boxes == 1)
            _append(self._results, result, self.boxes == 1)
        return self.pictures

    def finish(self) -> None:
        """Write predictions.json and detections.json, each whole or not at all."""
        categories = [{"id": number, "name": name} for number, name in enumerate(self.names)]
        self._assemble(
            "predictions.json",
            ('{"images": [', self._images),
            ('],\n"annotations": [', self._annotations),
            f'],\n"categories": {json.dumps(categories)}}}\n',
        )
        self._assemble("detections.json", ("[", self._results), "]\n")

    def _assemble(self, name: str, *parts: tuple[str, IO[str]] | str) -> None:
        with (
            replacing(self.folder / name) as temporary,
            temporary.open("w", encoding="ascii") as file,
        ):
            for part in parts:
                file.write(part if isinstance(part, str) else part[0])
                if not isinstance(part, str):
                    part[1].seek(0)
                    shutil.copyfileobj(part[1], file)


def _append(file: IO[str], row: dict[str, Any], first: bool) -> None:
    file.write(("" if first else ",") + "\n" + json.dumps(row))


class Drawings:
    """Draws pictures into a folder, each under its own relative path and as a JPEG."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.names = names
        self._resolved = folder.resolve()
        self._taken: set[PurePosixPath] = set()

    def made(self, source: str) -> bool:
        """Tell whether a picture is a drawing of an earlier run, where pictures lie around DIR."""
        return self._resolved in Path(source).resolve().parents

    def draw(self, number: int, name: str, picture: Picture, found: Detections) -> None:
        """Draw the boxes that were found in the picture with this id and file name."""
        image = as_image(picture.pixels())
        image.thumbnail((_LONGEST_JPEG, _LONGEST_JPEG))
        scale = np.array([image.width / picture.width, image.height / picture.height] * 2)
        boxes = found.boxes.numpy() * scale
        drawn = draw_boxes(image, boxes, found.classes.numpy(), self.names, found.scores.numpy())
        path = self.folder / self._place(number, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(path, "JPEG", quality=90)

    def _place(self, number: int, name: str) -> PurePosixPath:
        """Say where a drawing goes: inside the folder whatever the name, and never on another."""
        parts = [part for part in PurePosixPath(name).parts if part.strip("/") not in ("", "..")]
        plain = PurePosixPath(*parts) if parts else PurePosixPath(str(number))
        place = plain.with_name(f"{plain.stem}.jpg")
        if place in self._taken:
            place = plain.with_name(f"{plain.stem}-{number}.jpg")
        self._taken.add(place)
        return place
