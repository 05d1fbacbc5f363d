"""Labeled pictures: COCO json, YOLO text, Pascal VOC xml and labeled shards, in one form.

What: `open_labeled` takes what a person writes as data.train or data.val and gives
`LabeledSamples`, which are `Samples` like any others: the same order, loader and resume serve both
stages. `annotations` gives a picture's boxes in upright pixels, cleaned by the policy that
groundwork.data.label_policy states; the formats are in label_coco, label_yolo, label_voc and
label_shards, and where splits and names come from in label_roots.

A picture that the labels name and that is missing on the disk is an error for val and test, whose
figures would not be comparable; for train, and where no split is asked for, it is reported and left
out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from groundwork.data.annotations import Annotations
from groundwork.data.decode import Picture, naming, open_picture
from groundwork.data.label_policy import LISTED_TWICE, MISSING_PICTURE, Defects, Labels, settle
from groundwork.data.label_roots import Root, find_root
from groundwork.data.label_shard_sets import SCENES, find_shards, open_shard_labels
from groundwork.data.label_shards import ShardLabels
from groundwork.data.label_table import HeldOut, LabelTable, check_names, choose
from groundwork.data.reading import PLAIN, Reading
from groundwork.data.samples import PictureFiles
from groundwork.data.shard_index import sha256_text
from groundwork.data.shards import Sample, Samples
from groundwork.errors import DataError


class LabeledSamples:
    """Pictures with labels; the Samples protocol.

    `names` are the classes; `splits` those that the data set has, none where it is not split;
    `form` what its labels are; `notes` what a person should know of how they were read. `defects`
    are those found so far: what needs a picture's size is found by `annotations`. `fingerprint`
    covers pictures, labels and names. Picklable.
    """

    def __init__(
        self,
        pictures: Samples,
        names: tuple[str, ...],
        defects: Defects,
        *,
        form: str,
        splits: Sequence[str],
        notes: Sequence[str] = (),
        reading: Reading = PLAIN,
    ) -> None:
        self.name = pictures.name
        self.shard_sizes = pictures.shard_sizes
        self.fingerprint = pictures.fingerprint
        self.names = names
        self.defects = defects
        self.form = form
        self.splits = tuple(splits)
        self.notes = tuple(notes)
        self.reading = reading
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def local(self) -> bool:
        """Whether all pictures are on this machine: in files, or in shards that are."""
        return not (isinstance(self._pictures, ShardLabels) and self._pictures.remote)

    def read(self, shard: int, index: int) -> Sample:
        """Read one sample, its labels as they are written included. Raises DataError."""
        return self._pictures.read(shard, index)

    def annotations(self, sample: Sample, picture: Picture) -> Annotations:
        """Return the boxes of a sample that `read` gave, and of its opened picture.

        Upright pixels, cleaned by the policy of groundwork.data.label_policy; the same sample
        always gives the same. What was mended is added to `defects`.
        """
        if not isinstance(sample.annotation, Labels):
            raise TypeError("The sample was not read from labeled data.")
        return settle(sample.annotation, picture, self.defects)

    def look(self, shard: int, index: int) -> tuple[Sample, Picture, Annotations]:
        """Read a sample, open its picture, and settle its labels. Raises DataError naming it."""
        sample = self.read(shard, index)
        with naming(f"{sample.key} of {sample.source}"):
            picture = open_picture(sample.image, self.reading)
        return sample, picture, self.annotations(sample, picture)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Hear which shards come next."""
        self._pictures.prefetch(shards)

    def close(self) -> None:
        """Give back open files; a later read opens them again."""
        self._pictures.close()


class _TableSamples(PictureFiles):
    """Pictures that are files of their own, with their labels from a table."""

    def __init__(
        self, table: LabelTable, sizes: Sequence[int], names: Sequence[str], name: str
    ) -> None:
        super().__init__(table.root, zip(table.paths, sizes, strict=True), name)
        self.fingerprint = sha256_text([self.fingerprint, table.digest(), *map(repr, names)])
        self._table = table

    def read(self, shard: int, index: int) -> Sample:
        """Read one picture and its labels. Raises DataError naming its file."""
        sample = super().read(shard, index)
        return dataclasses.replace(sample, annotation=self._table.labels(shard))


def splits_of(data: str) -> tuple[str, ...]:
    """Return the splits of its own that a data set has; none where it is not split.

    Raises DataError where there are no labels.
    """
    shards = find_shards(data)
    if shards is not None:
        return tuple(split for split in shards if split is not None)
    return find_root(data).splits()


def has_split(data: str, split: str) -> bool:
    """Tell whether a data set's root supplies a split (train, val, test) of its own.

    False for data that is not split. Raises DataError where there are no labels.
    """
    return split in splits_of(data)


def training_split(data: str, needed_by: str) -> str | None:
    """Return the split to learn from: train, or None where data is not split.

    Raises DataError where the root has others and no train: pictures for validation and test would
    be learned.
    """
    splits = splits_of(data)
    if splits and "train" not in splits:
        raise DataError(
            f"{data} has no train split for {needed_by}, which must not learn from "
            f"{' and '.join(sorted(splits))}: name data that has one, or that is not split."
        )
    return "train" if splits else None


def open_labeled(
    data: str,
    split: str | None,
    *,
    cache: Path,
    cache_bytes: int,
    names_in: Path | None = None,
    held_out: HeldOut | None = None,
    reading: Reading = PLAIN,
) -> LabeledSamples:
    """Open a labeled data set, or one split of it.

    `data` is a root, a COCO json, a data.yaml, a list of pictures, labeled shards or `scenes`;
    `split` is train, val or test, or None for all that is there. Data that is not split is opened
    whole whatever the split (ask `has_split` first). `names_in` is a file of pictures' names, one a
    line: only those are kept, and of them a part where `held_out` says so (`label_table.choose`,
    which raises DataError where a list or the pictures do not allow it). `cache` and `cache_bytes`
    are as in groundwork.data.samples.open_samples.

    Raises DataError for labels that are not there or cannot be trusted, see the format's module.
    """
    shards = find_shards(data)
    if shards is not None:
        splits = tuple(key for key in shards if key is not None)
        _check_split(data, split, splits)
        samples, names = open_shard_labels(
            data,
            shards,
            split,
            cache=cache,
            cache_bytes=cache_bytes,
            names_in=names_in,
            held_out=held_out,
        )
        form = "drawn scenes" if data == SCENES else "labeled shards"
        check_names(data, names)
        # Scenes are drawn in colours: no mapping of other pictures is theirs.
        reading = Reading(reading.max_pixels) if data == SCENES else reading
        return LabeledSamples(samples, names, Defects(), form=form, splits=splits, reading=reading)
    root = find_root(data)
    _check_split(data, split, root.splits())
    return _open_files(data, split, root, names_in, held_out, reading)


def _check_split(data: str, split: str | None, splits: Sequence[str]) -> None:
    if split is not None and splits and split not in splits:
        raise DataError(
            f"{data} has no split {split!r}, only {', '.join(splits)}: name the data of {split} by "
            "itself."
        )


# ---- pictures in files -------------------------------------------------------------------------


def _open_files(
    data: str,
    split: str | None,
    root: Root,
    names_in: Path | None,
    held_out: HeldOut | None,
    reading: Reading,
) -> LabeledSamples:
    defects = Defects()
    tables = root.read(split, defects)
    check_names(data, root.names)
    table, sizes = _present(LabelTable.joined(list(tables.values())), split, defects)
    if names_in is not None or held_out is not None:
        chosen = choose(names_in, held_out, table.paths)
        table, sizes = table.select(chosen), [sizes[picture] for picture in chosen]
    table = table.without_broken(defects)
    name = f"{data} ({split})" if split is not None and root.splits() else data
    return LabeledSamples(
        _TableSamples(table, sizes, root.names, name),
        root.names,
        defects,
        form=root.form,
        splits=root.splits(),
        notes=root.notes,
        reading=reading,
    )


def _present(
    table: LabelTable, split: str | None, defects: Defects
) -> tuple[LabelTable, list[int]]:
    """Leave out what is missing or there twice; also return the sizes of the pictures' files."""
    chosen: dict[str, tuple[int, int]] = {}
    missing: list[int] = []
    for number, path in enumerate(table.paths):
        if path in chosen:
            defects.add(LISTED_TWICE, path)
            continue
        try:
            chosen[path] = number, (table.root / path).stat().st_size
        except (OSError, ValueError):  # ValueError: a name that no file can have
            missing.append(number)
            defects.add(MISSING_PICTURE, str(table.root / path), f"named by {table.files[number]}")
    if missing and (split in ("val", "test") or not chosen):
        raise DataError(
            f"{len(missing)} of {len(table)} pictures are missing, the first being "
            f"{table.root / table.paths[missing[0]]}, which {table.files[missing[0]]} names: put "
            "them there, or remove them from the labels."
        )
    numbers = [number for number, _ in chosen.values()]
    return table.select(numbers), [size for _, size in chosen.values()]
