"""Images in .parquet files, as Hugging Face datasets writes them. pyarrow (`vavae-fast[data]`) is imported on use."""

import functools
import json
import threading
from pathlib import Path

import torch

from vavae_fast.data.listing import Source
from vavae_fast.errors import BadInput


def open_parquet(paths: list[Path]) -> Source:
    """Hugging Face's layout: a struct column with `bytes` (or a binary column `image`), an integer column `label`."""
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError:
        raise BadInput(f"{paths[0]}: reading parquet needs pyarrow; pip install 'vavae-fast[data]'") from None
    files, places, names, labels, classes = [], [], [], [], []
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            image, label, classes = _parquet_columns(path, file.schema_arrow, pa)
            values = file.read([label]).column(0).to_pylist() if label else [None] * file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise BadInput(f"{path}: not a readable parquet file ({' '.join(str(error).split())}); fetch it again") from None
        names += [f"{path.name}:{row}" for row in range(len(values))]
        labels += [-1 if value is None else int(value) for value in values]
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        places += [(len(files), group, row) for group, size in enumerate(sizes) for row in range(size)]
        files.append((path, file, image))
    if not names:
        raise BadInput(f"{paths[0].parent if len(paths) > 1 else paths[0]}: no images; check the path")
    lock = threading.Lock()

    @functools.lru_cache(maxsize=4)
    def row_group(file_number: int, group: int):
        path, file, image = files[file_number]
        column = file.read_row_group(group, columns=[image]).column(0).combine_chunks()
        return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column

    def read(i: int) -> bytes:
        file_number, group, row = places[i]
        with lock:  # a ParquetFile is not safe to share between threads
            value = row_group(file_number, group)[row].as_py()
        if value is None:
            raise BadInput(f"{files[file_number][0]}: row {names[i].rpartition(':')[2]} has no image bytes; embed the images in the file")
        return value

    classes = classes or [str(value) for value in range(max(labels) + 1)]
    return Source(names, torch.tensor(labels, dtype=torch.int64).clamp_(min=-1), classes, read)


def _parquet_columns(path: Path, schema, pa) -> tuple[str, str | None, list[str]]:
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
