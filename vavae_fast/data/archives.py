"""Images in a .tar or .zip, read member by member and never extracted.

Names in archives are hostile until checked: absolute ones, `..`, links and devices are refused.
"""

import io
import os
import tarfile
import weakref
import zipfile
import zlib
from pathlib import Path

from vavae_fast.data.listing import Listing, check_size, matters
from vavae_fast.errors import BadInput

_MAX_NAME = 1 << 20  # bytes of a long name, or of a PAX header


def _safe_name(archive: Path, name: str) -> str:
    """The member's name without "./"; `BadInput` when it leads out of the archive."""
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts or ":" in parts[0] or "\0" in name:
        raise BadInput(f"{archive}: member {name!r} leads out of the archive; it is hostile or damaged, do not use it")
    return "/".join(part for part in parts if part not in ("", "."))


def _checked_members(archive: Path, members: list[tuple]) -> list[tuple]:
    """(name, …) tuples of which no two have the same name."""
    seen = set()
    for name, *_ in members:
        if name in seen:
            raise BadInput(f"{archive}: member {name!r} occurs twice; rebuild the archive")
        seen.add(name)
    return members


def _tar(path: Path) -> Listing:
    members = _checked_members(path, _tar_members(path))
    file = open(path, "rb", buffering=0)  # pread needs no lock

    def read(k: int) -> bytes:
        name, offset, size = members[k]
        data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise BadInput(f"{path}: member {name} is cut short; the file changed while it was open")
        return data

    listing = Listing([name for name, *_ in members], read)
    weakref.finalize(listing, file.close)
    return listing


class _Headers(io.BufferedReader):
    """What tarfile reads of an archive while it looks for members: headers and long names, whose size the archive itself says."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _MAX_NAME:
            raise tarfile.ReadError(f"a name or a header of {size} bytes")
        return super().read(size)


def _tar_members(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset of the data, size) of every member that matters."""
    members, length = [], path.stat().st_size
    try:
        with _Headers(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # it would keep an object for each of a million members
                name = _safe_name(path, member.name)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise BadInput(f"{path}: member {member.name!r} is a link, a device or sparse; rebuild the archive from plain files")
                if member.offset_data + member.size > length:
                    raise BadInput(f"{path}: cut short inside member {name}; fetch it again")
                if matters(name):
                    check_size(f"{path}/{name}", member.size)
                    members.append((name, member.offset_data, member.size))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BadInput(f"{path}: not a readable uncompressed tar ({error}); fetch it again, or decompress it") from None
    return members


def _zip(path: Path) -> Listing:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise BadInput(f"{path}: not a readable zip ({error}); fetch it again") from None
    members = _checked_members(path, _zip_members(path, archive))

    def read(k: int) -> bytes:
        name, info = members[k]
        try:
            with archive.open(info) as member:  # ZipFile takes a lock around each access to the file
                data = member.read(info.file_size)  # no more, whatever the bytes unfold to: the directory's size was checked
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
            raise BadInput(f"{path}: member {name} cannot be read ({error}); fetch the archive again") from None
        if len(data) != info.file_size:
            raise BadInput(f"{path}: member {name} is shorter than the archive says; fetch the archive again")
        return data

    listing = Listing([name for name, _ in members], read)
    weakref.finalize(listing, archive.close)
    return listing


def _zip_members(path: Path, archive: zipfile.ZipFile) -> list[tuple[str, zipfile.ZipInfo]]:
    members = []
    for info in archive.infolist():
        name = _safe_name(path, info.orig_filename)
        kind = info.external_attr >> 16 & 0o170000
        if info.is_dir():
            continue
        if kind not in (0, 0o100000):
            raise BadInput(f"{path}: member {name!r} is a link or a device; rebuild the archive from plain files")
        if matters(name):
            check_size(f"{path}/{name}", info.file_size)
            members.append((name, info))
    return members


ARCHIVES = {".tar": _tar, ".zip": _zip}


def joined(shards: list[Path]) -> Listing:
    """Archives side by side: names are `shard/member`."""
    listings = [ARCHIVES[shard.suffix](shard) for shard in shards]
    places = [(listing, k) for listing in listings for k in range(len(listing.names))]
    names = [f"{shard.name}/{name}" for shard, listing in zip(shards, listings) for name in listing.names]

    def read(position: int) -> bytes:
        listing, k = places[position]
        return listing.read(k)

    return Listing(names, read)
