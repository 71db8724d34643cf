"""Images in tables: .parquet files, and data sets that Hugging Face's `save_to_disk` wrote. pyarrow (`vavae-fast[data]`) is imported on use."""

import functools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vavae_fast.data.class_labels import is_label
from vavae_fast.data.listing import Source
from vavae_fast.errors import BadInput

SAVED = "state.json"  # in every folder of one data set that save_to_disk wrote
_SAVED_SPLITS = "dataset_dict.json"  # in a folder of several


@dataclass(frozen=True)
class _Table:
    """One file: its rows' labels, the classes that it names, and the encoded image of a row, None where there is none."""

    path: Path
    labels: list[int | None]
    classes: list[str]
    read: Callable[[int], bytes | None]


def open_parquet(paths: list[Path]) -> Source:
    """Hugging Face's layout: a struct column with `bytes` (or a binary column `image`), an integer column `label`."""
    pa = _pyarrow(paths[0])
    return _source([_read_table(path, pa, _parquet_table) for path in paths], paths[0].parent if len(paths) > 1 else paths[0], pa)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return (folder / SAVED).is_file() or (folder / _SAVED_SPLITS).is_file()


def open_saved(folder: Path) -> Source:
    """A data set of `save_to_disk`: Arrow files, memory-mapped, in the order that its state.json gives."""
    if not (folder / SAVED).is_file():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{SAVED}"))) or "none that is whole"
        raise BadInput(f"{folder}: holds splits of a data set ({splits}); give the folder of one of them")
    try:
        state = json.loads((folder / SAVED).read_bytes())
        paths = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BadInput(f"{folder / SAVED}: not what save_to_disk writes ({' '.join(str(error).split())}); save the data set again") from None
    if state.get("_indices_data_files"):
        raise BadInput(f"{folder}: its rows are reordered by an index; call flatten_indices() on the data set and save it again")
    pa = _pyarrow(folder)
    return _source([_read_table(path, pa, _arrow_table) for path in paths], folder, pa)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"{path}: reading parquet and Arrow files needs pyarrow; pip install 'vavae-fast[data]'") from None
    return pyarrow


def _read_table(path: Path, pa: Any, read: Callable[[Path, Any], _Table]) -> _Table:
    with _reading(path, pa):
        return read(path, pa)


@contextmanager
def _reading(path: Path, pa: Any) -> Iterator[None]:
    """What pyarrow raises on damaged files, as one line about `path`."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path}: not a readable {path.suffix[1:]} file ({' '.join(str(error).split())}); fetch it again") from None


def _parquet_table(path: Path, pa: Any) -> _Table:
    file = pa.parquet.ParquetFile(path)
    image, label, classes = _columns(path, file.schema_arrow, pa)
    labels = file.read([label]).column(0).to_pylist() if label else [None] * file.metadata.num_rows
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    places = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
    lock = threading.Lock()

    @functools.lru_cache(maxsize=4)
    def row_group(group: int) -> Any:
        return _encoded(file.read_row_group(group, columns=[image]).column(0).combine_chunks(), pa)

    def read(row: int) -> bytes | None:
        group, place = places[row]
        with lock:  # a ParquetFile is not safe to share between threads
            return row_group(group)[place].as_py()

    return _Table(path, labels, classes, read)


def _arrow_table(path: Path, pa: Any) -> _Table:
    with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:  # what is read from it looks into the mapped file
        image, label, classes = _columns(path, stream.schema, pa)
        batches = list(stream)
    labels = [value for batch in batches for value in (batch.column(label).to_pylist() if label else [None] * len(batch))]
    places = [(number, row) for number, batch in enumerate(batches) for row in range(len(batch))]
    images = [_encoded(batch.column(image), pa) for batch in batches]

    def read(row: int) -> bytes | None:
        number, place = places[row]
        return images[number][place].as_py()

    return _Table(path, labels, classes, read)


def _source(tables: list[_Table], root: Path, pa: Any) -> Source:
    """Tables one after the other; image i is `file:row`."""
    places = [(table, row) for table in tables for row in range(len(table.labels))]
    if not places:
        raise BadInput(f"{root}: no images; check the path")
    classes = tables[0].classes
    for table in tables:
        if table.classes != classes:
            raise BadInput(f"{table.path}: its classes are not those of {tables[0].path.name}; keep one data set in a folder")

    def read(i: int) -> bytes:
        table, row = places[i]
        with _reading(table.path, pa):
            value = table.read(row)
        if value is None:
            raise BadInput(f"{table.path}: row {row} has no image bytes; embed the images in the file")
        return value

    labels = torch.tensor([_label(table, row) for table, row in places])
    classes = classes or [str(value) for value in range(int(labels.max()) + 1)]
    return Source([f"{table.path.name}:{row}" for table, row in places], labels, classes, read)


def _label(table: _Table, row: int) -> int:
    """-1 where the row has none."""
    value = table.labels[row]
    if value is None or value == -1:  # as Hugging Face marks the labels of a test split
        return -1
    if not is_label(value):
        raise BadInput(f"{table.path}: row {row} has the label {value}; labels are numbers of classes, from 0")
    return value


def _encoded(column: Any, pa: Any) -> Any:
    return pa.compute.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _columns(path: Path, schema: Any, pa: Any) -> tuple[str, str | None, list[str]]:
    """(image column, label column or None, class names when the file has them)."""
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    binary = [f.name for f in schema if f.name == "image" and (pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type))]
    if not structs + binary:
        raise BadInput(f"{path}: no image column; expected a struct with 'bytes', as Hugging Face datasets writes it, got {schema.names}")
    label = next((f.name for f in schema if f.name in ("label", "labels") and pa.types.is_integer(f.type)), None)
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        classes = [str(name) for name in features["info"]["features"][label]["names"]]
    except (ValueError, KeyError, TypeError):
        classes = []
    return (structs + binary)[0], label, classes
