"""An image's class: from `dataset.json` (EDM2), from `.cls` files (WebDataset), else from its folder.

The folder that counts is the first below the one that all images share, so both `root/dog/1.jpg` and
`root/train/dog/1.jpg` are class `dog`. Where there is none the label is -1.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vavae_fast.data.listing import LABEL_FILE, LABEL_SUFFIX, Listing
from vavae_fast.errors import BadInput

MOST_CLASSES = 1 << 20  # each has a name in memory; ImageNet-21k has 21,841
SPLITS = {"train", "training", "val", "valid", "validation", "test"}


def labels_of(root: Path, listing: Listing, names: list[str], shard_depth: int) -> tuple[Tensor, list[str]]:
    if LABEL_FILE in listing.names:
        values = _edm2_labels(root, listing, names)
    elif any(name.endswith(LABEL_SUFFIX) for name in listing.names):
        values = _webdataset_labels(root, listing, names)
    else:
        return _folder_labels(root, names, shard_depth)
    classes = [str(value) for value in range(max(values) + 1)]
    return torch.tensor(values, dtype=torch.int64), classes


def is_label(value: Any) -> bool:
    """Whether a file's label is the number of a class."""
    return type(value) is int and 0 <= value < MOST_CLASSES


def _folder_labels(root: Path, names: list[str], shard_depth: int) -> tuple[Tensor, list[str]]:
    folders = [name.rpartition("/")[0] for name in names]
    parts = {folder: folder.split("/")[shard_depth:] if folder else [] for folder in set(folders)}
    depth = len(os.path.commonprefix(list(parts.values())))
    if all(len(part) == depth for part in parts.values()):
        depth -= 1  # one folder holds every image: it is the class itself, unless there is none or it names a split
    class_of = {folder: part[depth] for folder, part in parts.items() if 0 <= depth < len(part)}
    found = set(class_of.values())
    if len(found) > 1 and found <= SPLITS:
        raise BadInput(f"{root}: holds the splits {', '.join(sorted(found))}; give the folder of one of them")
    classes = sorted(found - SPLITS) if len(found) == 1 else sorted(found)
    number = {name: k for k, name in enumerate(classes)}
    labels = [number.get(class_of.get(folder), -1) for folder in folders]
    return torch.tensor(labels, dtype=torch.int64), classes


def _edm2_labels(root: Path, listing: Listing, names: list[str]) -> list[int]:
    """`{"labels": [["00000/img00000000.png", 6], …]}`, or null for no labels: the layout of EDM2's dataset tool."""
    try:
        pairs = json.loads(listing.read(listing.names.index(LABEL_FILE)))["labels"] or []
        label_of = dict(pairs)
        well_formed = all(isinstance(name, str) and is_label(label) for name, label in pairs) and len(label_of) == len(pairs)
    except (ValueError, KeyError, TypeError, RecursionError):
        well_formed = False
    if not well_formed:
        raise BadInput(f'{root}/{LABEL_FILE}: expected {{"labels": [[name, integer from 0], …]}}, a name once; repair or remove it')
    return [label_of.get(name, -1) for name in names]


def _webdataset_labels(root: Path, listing: Listing, names: list[str]) -> list[int]:
    """`000001.cls`, decimal text, belongs to `000001.jpg`; the key ends at the first dot of the file name."""
    label_of = {}
    for k, name in enumerate(listing.names):
        if name.endswith(LABEL_SUFFIX):
            text = listing.read(k)[:32].strip()
            if not (text.isdigit() and is_label(int(text))):
                raise BadInput(f"{root}/{name}: expected a class number, found {text!r}; repair or remove it")
            label_of[_key(name)] = int(text)
    return [label_of.get(_key(name), -1) for name in names]


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
