"""YOLO text: one file of lines for each picture, `class x y width height` in shares of its sides.

What: `YoloRoot` reads the pictures of a data set and the label file of each: the path of the
picture with its last folder `images` turned into `labels`, ending in .txt; where the picture lies
in no such folder, the .txt beside it. x and y are the middle of the box. A line of more numbers, an
even count of them, is the outline of the object, and is read as the box around it; where a
data.yaml has `kpt_shape`, it is a box with keypoints, of which the box is read.

Names are those of data.yaml, else of classes.txt, else class_0 and so on, as many as the labels of
all splits use. A picture with an empty label file is background; one without a label file is, too,
and is reported. Split lists in a data.yaml are folders, lists of folders, or text files of paths,
relative to its `path`, or else to itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundwork.config import parse_yaml
from groundwork.data.folders import walk
from groundwork.data.label_policy import NO_LABEL_FILE, NO_PICTURE, TWIN, Defects
from groundwork.data.label_table import MOST_CLASSES, LabelTable, relative
from groundwork.data.lists import read_lines
from groundwork.data.tar_format import picture_suffix
from groundwork.errors import DataError, UnavailableError, UsageError

# The second and third are what some exporters call it.
YAML_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_NO_LABELS = frozenset(("classes.txt", "names.txt", "train.txt", "val.txt", "test.txt"))
_THREADS = 8

Row = tuple[Sequence[float], int, int]  # box, class, line


@dataclass(slots=True)
class YoloRoot:
    """A YOLO data set: for each split (None: not split) folders of pictures or lists of paths."""

    root: Path
    sources: Mapping[str | None, Sequence[Path]]
    names: tuple[str, ...] = ()
    names_file: str = ""  # where they are from; "" where nothing names the classes
    keypoints: int = 0  # numbers of a line behind its box
    notes: list[str] = field(default_factory=list)

    form = "YOLO text"

    def splits(self) -> tuple[str, ...]:
        """Return the splits that there are; none where the data is not split."""
        return tuple(split for split in self.sources if split is not None)

    def read(self, split: str | None, defects: Defects) -> dict[str | None, LabelTable]:
        """Read one split, or all. Raises DataError for a file that is not what it should be."""
        named = bool(self.names)
        tables = {}
        for key, sources in self.sources.items():
            wanted = split is None or key in (None, split)
            # Without names the labels of the other splits say how many classes there are.
            if wanted or not named:
                try:
                    tables[key] = _table(self, sources, defects if wanted else Defects())
                except UnavailableError:
                    raise
                except DataError:  # of a split that was not asked for
                    if wanted:
                        raise
        if not named:
            most = max((int(t.classes.max()) for t in tables.values() if len(t.classes)), default=0)
            self.names = tuple(f"class_{number}" for number in range(most + 1))
            self.notes = ["nothing names the classes (no data.yaml, no classes.txt)"]
        return {key: t for key, t in tables.items() if split is None or key in (None, split)}


def label_file(picture: str) -> str:
    """Return where the labels of a picture are."""
    before, found, after = picture.rpartition("/images/")
    stem = (f"{before}/labels/{after}" if found else picture).rpartition(".")[0]
    return f"{stem}.txt"


# ---- what a data.yaml says ---------------------------------------------------------------------


def read_yaml_root(path: Path) -> YoloRoot:
    """Read a data.yaml. Raises DataError for one that names no pictures or has odd names."""
    document = _yaml(path)
    base = path.parent
    if isinstance(document.get("path"), str) and (base / document["path"]).is_dir():
        base = base / document["path"]
    sources: dict[str | None, Sequence[Path]] = {}
    for split, keys in YAML_SPLITS.items():
        given = next((document[key] for key in keys if document.get(key)), None)
        if given is not None:
            sources[split] = [_located(base, item, path) for item in _listed(given, path, split)]
    if not sources:
        raise DataError(f"{path} names no pictures: it has none of the keys train, val, test.")
    names = _yaml_names(document, path)
    keypoints = _keypoints(document, path)
    root = YoloRoot(base, sources, names, str(path) if names else "", keypoints)
    return root if names else with_classes_txt(root)


def read_yaml_alone(path: Path) -> YoloRoot:
    """Read what a data.yaml says of lines, names and keypoints, not of pictures. Raises DataError.

    It may have no names.
    """
    document = _yaml(path)
    names = _yaml_names(document, path)
    return YoloRoot(path.parent, {}, names, str(path), _keypoints(document, path))


def _yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The file {path} cannot be read: {error}.") from error
    try:
        document = parse_yaml(text, str(path))
    except UsageError as error:
        raise DataError(f"{error} Correct it, or export the data set again.") from error
    if not isinstance(document, dict):
        raise DataError(f"{path} holds no keys (train, val, names).")
    return document


def _listed(given: Any, path: Path, split: str) -> list[str]:
    items = given if isinstance(given, list) else [given]
    if not all(isinstance(item, str) for item in items):
        raise DataError(f"{path}: {split} must be a folder, a text file, or a list of these.")
    return items


def _located(base: Path, item: str, path: Path) -> Path:
    # Some exporters write ../train/images beside a data.yaml that lies next to train.
    for place in (base / item, path.parent / item, path.parent / item.removeprefix("../")):
        if place.exists():
            return place
    raise DataError(
        f"{path} names {item!r}, which is neither in {base} nor beside it: correct `path`, or put "
        "the pictures there."
    )


def _keypoints(document: dict[str, Any], path: Path) -> int:
    """Return how many numbers the keypoints of an object are: kpt_shape's two multiplied."""
    shape = document.get("kpt_shape")
    if shape is None:
        return 0
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)):
        raise DataError(f"{path}: kpt_shape must be two numbers: how many keypoints, and 2 or 3.")
    return int(shape[0] * shape[1])


def _yaml_names(document: dict[str, Any], path: Path) -> tuple[str, ...]:
    given, count = document.get("names"), document.get("nc")
    if given is None and type(count) is int and count > 0:
        return tuple(f"class_{number}" for number in range(count))
    if given is None:
        return ()
    if isinstance(given, dict):
        numbers = {int(key): value for key, value in given.items() if str(key).isdecimal()}
        if len(numbers) != len(given) or sorted(numbers) != list(range(len(given))):
            raise DataError(f"{path}: the keys of names must be the numbers from 0 on.")
        given = [numbers[number] for number in range(len(numbers))]
    if not isinstance(given, list) or not given or any(isinstance(x, dict | list) for x in given):
        raise DataError(f"{path}: names must be a list of names, or names by number.")
    if type(count) is int and count != len(given):
        raise DataError(f"{path}: nc is {count}, and there are {len(given)} names: correct one.")
    return tuple(map(str, given))


def with_classes_txt(root: YoloRoot) -> YoloRoot:
    """Add the names of a classes.txt in the root, or in or below its folder of labels."""
    labels = root.root / "labels"
    places = [root.root, labels, *(labels / split for split in root.splits())]
    found = next((p / "classes.txt" for p in places if (p / "classes.txt").is_file()), None)
    if found is not None:
        root.names, root.names_file = read_names(found), str(found)
    return root


def read_names(path: Path) -> tuple[str, ...]:
    """Read names of classes, one a line. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The names {path} cannot be read: {error}.") from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if not names or "" in names:
        raise DataError(f"{path} must have one name of a class on each line, and no empty line.")
    return tuple(names)


# ---- pictures and their labels -----------------------------------------------------------------


def _table(root: YoloRoot, sources: Sequence[Path], defects: Defects) -> LabelTable:
    first: dict[str, str] = {}  # label file -> picture
    for picture in dict.fromkeys(path for source in sources for path in _pictures(source)):
        if first.setdefault(label_file(picture), picture) != picture:
            defects.add(TWIN, picture)
    if not first:
        shown = ", ".join(map(str, sources))
        raise DataError(f"There is no picture in {shown}.")
    files, pictures = list(first), list(first.values())
    with ThreadPoolExecutor(_THREADS) as pool:
        contents = list(pool.map(_content, files))
    if all(content is None for content in contents):
        raise DataError(
            f"None of the {len(files)} pictures has a label file; the first one's would be "
            f"{files[0]}: put the labels there, or name other pictures."
        )
    _report_strays(files, defects)
    for picture, content in zip(pictures, contents, strict=True):
        if content is None:
            defects.add(NO_LABEL_FILE, picture)
    rows = []
    for number, (file, content) in enumerate(zip(files, contents, strict=True)):
        for box, class_number, line in parse_lines(content or b"", file, root):
            rows.append((number, box, class_number, False, line))
    listed = [
        (relative(picture, root.root), file, None)
        for picture, file in zip(pictures, files, strict=True)
    ]
    return LabelTable.of(root.root, "line", listed, rows, unit=True)


def _pictures(source: Path) -> list[str]:
    """Return the absolute paths of a folder's pictures, sorted, or of those a text file names."""
    if source.is_dir():
        found = [
            os.path.abspath(Path(place, name))  # noqa: PTH100 (pathlib keeps `..`)
            for place, names in walk(source)
            for name in names
            if picture_suffix(name)
        ]
        return sorted(found)
    if source.suffix != ".txt":
        raise DataError(f"{source} is neither a folder of pictures nor a list of them (.txt).")
    return [
        os.path.abspath(source.parent / line.strip())  # noqa: PTH100
        for line in read_lines(source)
    ]


def _content(file: str) -> bytes | None:
    """Return the bytes of a label file, None where there is none."""
    try:
        return Path(file).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"The labels {file} cannot be read: {error.strerror}.") from error


def _report_strays(files: Iterable[str], defects: Defects) -> None:
    """Report label files in the folders of these that belong to no picture."""
    known = set(files)
    for folder in sorted({file.rpartition("/")[0] for file in known}):
        if not Path(folder).is_dir():
            continue
        for name in sorted(os.listdir(folder)):  # noqa: PTH208 (names alone, a million of them)
            stray = name.lower().endswith(".txt") and name not in _NO_LABELS  # x.TXT is not read
            if stray and f"{folder}/{name}" not in known:
                defects.add(NO_PICTURE, f"{folder}/{name}")


def parse_lines(content: bytes, file: str, root: YoloRoot) -> list[Row]:
    """Read a label file. Raises DataError naming file and line."""
    rows: list[Row] = []
    text = content.decode("utf-8-sig", "replace")
    for line, words in enumerate(map(str.split, text.splitlines()), start=1):
        if not words:
            continue
        try:
            first, *numbers = map(float, words)
        except ValueError:
            first, numbers = math.nan, []
        if root.keypoints and len(numbers) == 4 + root.keypoints:
            numbers = numbers[:4]
        outline = not root.keypoints and len(numbers) >= 6 and len(numbers) % 2 == 0
        if not first.is_integer() or not (len(numbers) == 4 or outline):
            raise DataError(
                f"{file}, line {line}: {' '.join(words)[:100]!r} is neither `class x y width "
                f"height` nor {_more(root)}: correct or remove the line."
            )
        class_number = int(first)
        most = len(root.names) or MOST_CLASSES
        if not 0 <= class_number < most:
            known = f"of {root.names_file}" if root.names else "that are possible without names"
            raise DataError(
                f"{file}, line {line}: there is no class {class_number} among the {most} {known}, "
                "which count from 0: correct the line, or add the name."
            )
        rows.append((_box(numbers), class_number, line))
    return rows


def _more(root: YoloRoot) -> str:
    if root.keypoints:
        return f"that with {root.keypoints} numbers of keypoints (kpt_shape)"
    return "a class and an outline"


def _box(numbers: list[float]) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom of a middle and a size, or of an outline."""
    if len(numbers) == 4:
        x, y, width, height = numbers
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    xs, ys = numbers[::2], numbers[1::2]
    if not all(map(math.isfinite, numbers)):
        return math.nan, math.nan, math.nan, math.nan
    return min(xs), min(ys), max(xs), max(ys)
