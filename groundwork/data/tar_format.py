"""The tar format, as far as shards need it: names, headers written, headers scanned.

What: member names that any webdataset reader understands and that lead back to the original path;
a header for one member; a scan that finds every member's offset without reading its bytes.

Why an own scan: tarfile and webdataset take a damaged header in the middle of an archive for its
end and stop without a word, so that the rest of a shard is lost silently. Here every block is
either a header whose checksum holds, or part of the end-of-archive mark, or an error.

Source: POSIX.1-2001 pax (ustar interchange format); the GNU tar manual, "Basic Tar Format" (long
names). webdataset's rule for keys: everything up to the first dot of the base name.
"""

from __future__ import annotations

import os
import re
import tarfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from groundwork.errors import DataError

# What groundwork.data.decode reads, by the names that such files have.
PICTURE_SUFFIXES = frozenset(
    "jpg jpeg png bmp gif webp tif tiff avif jp2 j2k ppm pgm pnm".split()  # noqa: SIM905
)
BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
MAX_MEMBER_BYTES = 1 << 30
# A long name or a set of pax records; a real one has a few hundred bytes.
_MAX_HEADER_BYTES = 1 << 20
_LONGEST_END = 1 << 20  # bytes; tar fills up to 10,240
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_REGULAR = frozenset((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE))
# What the size field of these says is not followed by data in the archive.
_WITHOUT_DATA = frozenset(
    (
        tarfile.LNKTYPE,
        tarfile.SYMTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.DIRTYPE,
        tarfile.FIFOTYPE,
    )
)


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file inside a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


# ---- names -------------------------------------------------------------------------------------


def escape_key(key: str) -> str:
    """Write a sample's key so that webdataset, which cuts at the first dot, gives it back whole.

    Percent-escaped are: `%` itself, the dots of the base name, control characters (webdataset's
    pattern stops at a newline), bytes that are no UTF-8, and two leading underscores (webdataset
    skips `__name__/`). Everything else stays as it is. `unescape_key` is the exact inverse.

    Raises DataError for a key that could lead out of a folder, were the tar unpacked.
    """
    check_inside(key)
    folder, slash, base = key.rpartition("/")
    escaped = _escaped(folder) + slash + _escaped(base).replace(".", "%2E")
    return "%5F" + escaped[1:] if escaped.startswith("__") else escaped


def unescape_key(escaped: str) -> str:
    """Undo `escape_key`."""
    return os.fsdecode(urllib.parse.unquote_to_bytes(escaped))


def _escaped(text: str) -> str:
    return re.sub(
        "[%\x00-\x1f\x7f\x80-\x9f\u2028\u2029\ud800-\udfff]",
        lambda match: "".join(f"%{byte:02X}" for byte in os.fsencode(match[0])),
        text,
    )


def check_inside(name: str) -> None:
    """Raise DataError for a name that is empty, absolute, or climbs out with `..`."""
    if name.startswith("/") or not all(
        part and part not in (".", "..") and "\x00" not in part for part in name.split("/")
    ):
        raise DataError(
            f"The name {name!r} is empty, absolute or leads out of its folder: give it a plain "
            "relative name."
        )


def picture_suffix(name: str) -> str | None:
    """Return the last extension of a name, lower case, if it is that of a picture."""
    suffix = name.rpartition("/")[2].rpartition(".")[2].lower()
    return suffix if "." in name and suffix in PICTURE_SUFFIXES else None


# ---- writing -----------------------------------------------------------------------------------


def member_header(name: str, size: int) -> bytes:
    """Return the header blocks of a regular file; the same for the same arguments, always."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def padding(size: int) -> bytes:
    """Return the null bytes that fill a member of `size` bytes up to a whole block."""
    return bytes(-size % BLOCK)


# ---- scanning ----------------------------------------------------------------------------------


def scan(path: Path) -> Iterator[Member]:
    """Find the regular members of a tar file, in file order, reading headers only.

    A hard link is the earlier member that it names, under its own name. Other links, pipes, devices
    and folders are passed over. Raises DataError, naming the file and the
    byte, for: an empty or compressed file; a header whose checksum is wrong; a member that ends
    beyond the file or has more than MAX_MEMBER_BYTES; a missing end-of-archive mark; data
    behind that mark, or very many null bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"The shard {path} cannot be opened: {error.strerror}.") from error
    try:
        yield from _Scan(descriptor, path).members()
    finally:
        os.close(descriptor)


class _Scan:
    """One pass over the headers of an open tar file."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor = descriptor
        self.path = path
        self.length = os.fstat(descriptor).st_size

    def members(self) -> Iterator[Member]:
        self._check_beginning()
        offset = 0
        name: str | None = None  # from a GNU long name or a pax record, for the next member
        link: str | None = None  # the same of what a link names
        size: int | None = None
        seen: dict[str, Member] = {}
        while True:
            header = self._header(offset)
            if header is None:
                self._check_end(offset)
                return
            data = offset + BLOCK
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                content = self._small(data, header.size)
                text = os.fsdecode(content.split(b"\x00", 1)[0])
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    name = text
                else:
                    link = text
                offset = data + _padded(header.size)
                continue
            if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
                records = self._records(data, header.size)
                if header.type != tarfile.XGLTYPE:
                    name = records.get("path", name)
                    link = records.get("linkpath", link)
                    size = _number(records.get("size"), size)
                offset = data + _padded(header.size)
                continue
            found = Member(
                name if name is not None else header.name,
                data,
                size if size is not None else header.size,
            )
            target = link if link is not None else header.linkname
            name = link = size = None
            if header.type == tarfile.GNUTYPE_SPARSE:
                raise self._damage(offset, f"the member {found.name!r} is a sparse file")
            if header.type == tarfile.LNKTYPE and target in seen:
                seen[found.name] = linked = replace(seen[target], name=found.name)
                yield linked
            if header.type in _WITHOUT_DATA:
                offset = data
                continue
            self._check_member(found)
            if header.type in _REGULAR:
                seen[found.name] = found
                yield found
            offset = data + _padded(found.size)

    def _check_beginning(self) -> None:
        if self.length == 0:
            raise DataError(f"The shard {self.path} is empty (0 bytes): copy or make it again.")
        beginning = os.pread(self.descriptor, 8, 0)
        for magic, compression in _COMPRESSED.items():
            if beginning.startswith(magic):
                raise DataError(
                    f"The shard {self.path} is compressed ({compression}), which cannot be read "
                    "at an offset: unpack it to a plain tar."
                )

    def _header(self, offset: int) -> tarfile.TarInfo | None:
        """Read the header at `offset`; None for the null block that begins the end mark."""
        block = os.pread(self.descriptor, BLOCK, offset)
        if not block:
            raise self._damage(offset, "it ends without an end-of-archive mark: cut off")
        if len(block) < BLOCK:
            raise self._damage(offset, "it ends in the middle of a header: cut off")
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if not any(block):
                return None
            what = "not a tar file" if offset == 0 else "a damaged header"
            raise self._damage(offset, f"{what} ({error})") from error
        if header.size < 0:
            raise self._damage(offset, "a damaged header (negative size)")
        return header

    def _small(self, offset: int, size: int) -> bytes:
        if size > _MAX_HEADER_BYTES:
            raise self._damage(offset, f"a header record of {size} bytes")
        content = os.pread(self.descriptor, size, offset)
        if len(content) < size:
            raise self._damage(offset, "it ends in the middle of a header record: cut off")
        return content

    def _records(self, offset: int, size: int) -> dict[str, str]:
        """Read pax records: `length keyword=value newline`, the length counting itself."""
        content = self._small(offset, size)
        records = {}
        position = 0
        while position < len(content) and content[position]:
            match = re.compile(rb"(\d{1,20}) ([^=]+)=").match(content, position)
            end = position + int(match[1]) if match else 0
            if not match or end > len(content) or content[end - 1 : end] != b"\n":
                raise self._damage(offset, "a damaged pax record")
            records[os.fsdecode(match[2])] = os.fsdecode(content[match.end() : end - 1])
            position = end
        if any(keyword.startswith("GNU.sparse") for keyword in records):
            raise self._damage(offset, "a sparse file")
        return records

    def _check_member(self, member: Member) -> None:
        if member.size > MAX_MEMBER_BYTES:
            raise DataError(
                f"The shard {self.path} says that its member {member.name!r} has {member.size} "
                f"bytes, more than the limit of {MAX_MEMBER_BYTES}: the header is damaged, or "
                "this is no shard of pictures."
            )
        if member.offset + member.size > self.length:
            raise self._damage(
                member.offset,
                f"the member {member.name!r} of {member.size} bytes ends beyond the file's "
                f"{self.length} bytes: cut off",
            )

    def _check_end(self, offset: int) -> None:
        """Behind the first null block there may be nothing but null bytes, and not many of them."""
        if self.length - offset > _LONGEST_END:
            raise self._damage(
                offset,
                f"{self.length - offset} null bytes to its end: its second part was never written",
            )
        while piece := os.pread(self.descriptor, 1 << 20, offset):
            if any(piece):
                raise self._damage(
                    offset, "data behind a null block, which other readers never see"
                )
            offset += len(piece)

    def _damage(self, offset: int, what: str) -> DataError:
        return DataError(
            f"The shard {self.path} is damaged at byte {offset}: {what}. Copy or make it again."
        )


def _padded(size: int) -> int:
    return size + -size % BLOCK


def _number(text: str | None, otherwise: int | None) -> int | None:
    if text is None:
        return otherwise
    # Not a number: a size that no file has, so that the member is refused with its name.
    return int(text) if text.isascii() and text.isdigit() else 1 << 62
