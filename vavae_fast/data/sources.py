"""Where encoded images lie: a folder, a .zip, a .tar, a .parquet, a folder or a pattern of such shards, or a data set of `save_to_disk`.

Names sort by their path components, so that a folder and an archive of it have the same order.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from vavae_fast.data.archives import ARCHIVES, joined
from vavae_fast.data.class_labels import SPLITS, labels_of
from vavae_fast.data.listing import IMAGE_SUFFIXES, Listing, Source, check_size, is_hidden, is_image, matters
from vavae_fast.data.tables import is_saved, open_parquet, open_saved
from vavae_fast.errors import BadInput


def open_source(path: Path) -> Source:
    """`BadInput` when there is nothing to read at `path`, or what is there is not to be trusted."""
    path = Path(path)
    if path.is_dir():
        return open_saved(path) if is_saved(path) else _open_folder(path)
    if is_pattern(path):
        return _open_shards(path, _matching(path))
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder; give a folder of images, a .zip, .tar or .parquet, or builtin:digits")
    if path.suffix == ".parquet":
        return open_parquet([path])
    if path.suffix in ARCHIVES:
        return _from_listing(path, ARCHIVES[path.suffix](path))
    cure = "decompress it first: members of a compressed tar cannot be read one by one" if ".tar" in path.name else "give one of these"
    raise BadInput(f"{path}: expected a folder, .zip, .tar or .parquet; {cure}")


def _open_folder(root: Path) -> Source:
    listing, shards = _folder(root)
    if any(is_image(name) for name in listing.names) or not shards:
        return _from_listing(root, listing)
    return _open_shards(root, shards)


def _open_shards(root: Path, shards: list[Path]) -> Source:
    """root: the folder or pattern that they come from."""
    kinds = {shard.suffix for shard in shards}
    if len(kinds) > 1:
        raise BadInput(f"{root}: shards of several kinds ({', '.join(sorted(kinds))}); keep one kind in a folder")
    splits = {shard.name.partition("-")[0] for shard in shards} & SPLITS
    if len(splits) > 1:
        example = f"{shards[0].parent}/{min(splits)}-*{shards[0].suffix}"
        raise BadInput(f"{root}: holds shards of the splits {', '.join(sorted(splits))}; give one of them by a pattern: {example}")
    if kinds == {".parquet"}:
        return open_parquet(shards)
    return _from_listing(root, joined(shards), shard_depth=1)


_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MOST_SHARDS = 100_000


def is_pattern(path: Path) -> bool:
    """Whether a path that does not exist stands for several: `images-{000..127}.tar`, as WebDataset writes it, or `train-*.parquet`."""
    return not path.exists() and ("*" in path.name or _RANGE.search(path.name) is not None)


def _matching(pattern: Path) -> list[Path]:
    """The shards that a pattern in a file's name stands for, each of which must be there."""
    names = [pattern.name]
    while found := _RANGE.search(names[0]):
        first, last = found[1], found[2]
        if (int(last) - int(first) + 1) * len(names) > _MOST_SHARDS:
            raise BadInput(f"{pattern}: stands for more than {_MOST_SHARDS:,} shards; check the pattern")
        numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        names = [name.replace(found[0], number, 1) for name in names for number in numbers]
        if not names:
            raise BadInput(f"{pattern}: {found[0]} counts backwards; write the smaller number first")
    paths = [path for name in names for path in (sorted(pattern.parent.glob(name)) if "*" in name else [pattern.parent / name])]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise BadInput(f"{pattern}: {f'{missing[0].name} is missing' if missing else 'no file matches'}; check the pattern")
    odd = next((path for path in paths if path.suffix not in (*ARCHIVES, ".parquet")), None)
    if odd is not None:
        raise BadInput(f"{odd}: expected .tar, .zip or .parquet shards; check the pattern {pattern.name}")
    return paths


def _from_listing(root: Path, listing: Listing, shard_depth: int = 0) -> Source:
    """shard_depth: how many leading components of each name are a shard's file name rather than a folder."""
    order = sorted((k for k, name in enumerate(listing.names) if is_image(name)), key=lambda k: listing.names[k].replace("/", "\0"))
    if not order:
        raise BadInput(f"{root}: no images ({', '.join(IMAGE_SUFFIXES)}); check the path")
    names = [listing.names[k] for k in order]
    labels, classes = labels_of(root, listing, names, shard_depth)
    return Source(names, labels, classes, lambda i: listing.read(order[i]))


def _folder(root: Path) -> tuple[Listing, list[Path]]:
    """The files below `root` that matter, and the archives directly in it."""
    names, shards = [], []
    home = os.path.realpath(root)
    for entry, name in _walk(root, ""):
        if is_hidden(name):
            continue
        if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(home):
            raise BadInput(f"{entry.path}: a link that leaves {root}; copy what it points to, or give that folder itself")
        if not (entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)):
            raise BadInput(f"{entry.path}: a link to a folder, a broken link or no file; remove it")
        if "/" not in name and name.endswith((*ARCHIVES, ".parquet")):
            shards.append(Path(entry.path))
        elif matters(name):
            names.append(name)
    return Listing(names, lambda k: _read_file(root / names[k])), sorted(shards)


def _walk(folder: Path, prefix: str) -> Iterator[tuple[os.DirEntry, str]]:
    """Every entry below `folder` that is no folder, with its name relative to the start. Links to folders are entries."""
    try:
        with os.scandir(folder) as entries:
            for entry in list(entries):
                if entry.is_dir(follow_symlinks=False):
                    yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
                else:
                    yield entry, prefix + entry.name
    except OSError as error:
        raise BadInput(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None


def _read_file(path: Path) -> bytes:
    try:
        check_size(str(path), path.stat().st_size)
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); the folder changed, or its permissions forbid it") from None
