"""Shards by pattern, parquet files and data sets of Hugging Face's `save_to_disk`: which images they hold, and what is refused."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from vavae_fast.data import open_images
from vavae_fast.data.tables import is_saved
from vavae_fast.errors import BadInput


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (17, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def squares(tmp_path, seeds):
    """What reading these pictures must give, by way of plain files."""
    folder = tmp_path / "plain"
    folder.mkdir(exist_ok=True)
    for k, seed in enumerate(seeds):
        (folder / f"{k:03d}.png").write_bytes(png(seed))
    return open_images(folder, size=8, backend="pil").read(range(len(seeds)))


# shards by pattern


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """in-000.tar … in-002.tar of WebDataset, two samples each, and one shard of another set beside them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for k in range(3):
        samples = [(f"{k:02d}{j}", 2 * k + j) for j in range(2)]
        pairs = [{f"{key}.png": png(seed), f"{key}.cls": str(seed).encode()} for key, seed in samples]
        write_tar(folder / f"in-{k:03d}.tar", pairs[0] | pairs[1])
    write_tar(folder / "other.tar", {"9.png": png(9), "9.cls": b"9"})
    return folder


@pytest.mark.parametrize(
    "pattern, labels",
    [
        ("in-{000..002}.tar", [0, 1, 2, 3, 4, 5]),
        ("in-{001..002}.tar", [2, 3, 4, 5]),
        ("in-*.tar", [0, 1, 2, 3, 4, 5]),
        ("in-00{0..1}.tar", [0, 1, 2, 3]),
        ("in-{00..00}{1..2}.tar", [2, 3, 4, 5]),
        ("*r.tar", [9]),
    ],
)
def test_patterns_of_shards(tmp_path, shards, pattern, labels):
    images = open_images(shards / pattern, size=8)
    assert images.labels.tolist() == labels
    assert torch.equal(images.read(range(len(labels))), squares(tmp_path, labels))


@pytest.mark.parametrize(
    "pattern, reason",
    [
        ("in-{000..005}.tar", "in-003.tar is missing"),
        ("no-*.tar", "no file matches"),
        ("in-{2..0}.tar", "counts backwards"),
        ("*.txt", "expected .tar"),
    ],
)
def test_patterns_that_cannot_be_meant(shards, pattern, reason):
    (shards / "x.txt").write_bytes(b"x")
    with pytest.raises(BadInput, match=reason) as caught:
        open_images(shards / pattern)
    assert "\n" not in str(caught.value)


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    write_tar(tmp_path / "{0..1}*.tar", {"1.png": png(1)})
    assert open_images(tmp_path / "{0..1}*.tar", size=8).names == ["1.png"]


def test_shards_of_two_splits_are_not_one_set(tmp_path):
    for split in ("train", "test"):
        write_tar(tmp_path / f"{split}-0.tar", {f"{split}.png": png(0)})
    with pytest.raises(BadInput, match=r"splits test, train; give one of them by a pattern: .*test-\*\.tar"):
        open_images(tmp_path)
    assert open_images(tmp_path / "train-*.tar", size=8).names == ["train-0.tar/train.png"]


# tables

CLASSES = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"]}}}})}


def table(seeds, labels=None, metadata=None):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'vavae-fast[data]'")
    rows = {"image": [{"bytes": None if seed is None else png(seed), "path": None} for seed in seeds]}
    return pa.table(rows | ({"label": labels} if labels else {})).replace_schema_metadata(metadata)


def write_parquet(path, *args, **options):
    content = table(*args, **options)
    import pyarrow.parquet

    pyarrow.parquet.write_table(content, path, row_group_size=2)


def write_saved(folder, parts, state=None):
    """As `save_to_disk` writes it: Arrow streams, named in their order by state.json."""
    import pyarrow.ipc

    folder.mkdir(parents=True)
    names = [f"data-{k:05d}-of-{len(parts):05d}.arrow" for k in range(len(parts))]
    for name, part in zip(names, parts):
        with pyarrow.ipc.new_stream(folder / name, part.schema) as stream:
            stream.write_table(part, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]} | (state or {})))
    (folder / "dataset_info.json").write_text("{}")


def test_parquet_files_in_hugging_faces_layout(tmp_path):
    write_parquet(tmp_path / "b.parquet", [3, 4], [1, 0], CLASSES)
    write_parquet(tmp_path / "a.parquet", [0, 1, 2], [0, None, 1], CLASSES)
    images = open_images(tmp_path, size=8)
    assert images.labels.tolist() == [0, -1, 1, 1, 0] and images.classes == ["cat", "dog"]
    assert torch.equal(images.read([4, 0, 2, 3]), squares(tmp_path, [4, 0, 2, 3]))


def test_parquet_without_labels_and_without_images(tmp_path):
    write_parquet(tmp_path / "x.parquet", [0])
    assert open_images(tmp_path / "x.parquet").labels.tolist() == [-1]
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 junk")
    with pytest.raises(BadInput, match="not a readable parquet"):
        open_images(tmp_path / "junk.parquet")


def test_a_data_set_saved_to_disk(tmp_path):
    write_saved(tmp_path / "saved", [table([0, 1, 2], [0, 1, None], CLASSES), table([3, 4], [1, -1], CLASSES)])
    images = open_images(tmp_path / "saved", size=8, threads=2)
    assert images.labels.tolist() == [0, 1, -1, 1, -1] and images.classes == ["cat", "dog"]
    assert images.names[3] == "data-00001-of-00002.arrow:0"
    assert torch.equal(images.read([4, 0, 2, 3]), squares(tmp_path, [4, 0, 2, 3]))


def test_saved_rows_come_in_the_order_that_state_json_gives(tmp_path):
    write_saved(tmp_path / "saved", [table([0]), table([1])])
    state = json.loads((tmp_path / "saved/state.json").read_text())
    state["_data_files"].reverse()
    (tmp_path / "saved/state.json").write_text(json.dumps(state))
    assert torch.equal(open_images(tmp_path / "saved", size=8).read([0, 1]), squares(tmp_path, [1, 0]))


def test_what_is_wrong_with_a_saved_data_set_is_named(tmp_path):
    write_saved(tmp_path / "both/train", [table([0])])
    write_saved(tmp_path / "both/test", [table([1])])
    (tmp_path / "both/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    write_saved(tmp_path / "reordered", [table([0])], {"_indices_data_files": [{"filename": "indices.arrow"}]})
    write_saved(tmp_path / "not embedded", [table([0, None])])
    write_saved(tmp_path / "cut", [table([0, 1, 2])])
    arrow = tmp_path / "cut/data-00000-of-00001.arrow"
    arrow.write_bytes(arrow.read_bytes()[:1000])
    write_saved(tmp_path / "gone", [table([0])])
    (tmp_path / "gone/data-00000-of-00001.arrow").unlink()
    write_saved(tmp_path / "two sets", [table([0], [0], CLASSES), table([1], [0])])
    for name, reason in {"both": r"splits of a data set \(test, train\)", "reordered": "flatten_indices", "cut": "not a readable arrow file",
                         "gone": "not a readable arrow file", "two sets": "its classes are not those"}.items():  # fmt: skip
        with pytest.raises(BadInput, match=reason) as caught:
            open_images(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert open_images(tmp_path / "both/train", size=8).read([0]).shape == (1, 3, 8, 8)
    with pytest.raises(BadInput, match="row 1 has no image bytes; embed"):
        open_images(tmp_path / "not embedded", size=8).read([0, 1])


@pytest.mark.parametrize("content", ["", "[]", '{"_data_files": 3}'])
def test_a_broken_state_json_is_named(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    assert is_saved(tmp_path)
    with pytest.raises(BadInput, match="state.json: not what save_to_disk writes"):
        open_images(tmp_path)


@pytest.mark.parametrize("name", ["x.parquet", "state.json"])
def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text('{"_data_files": []}')
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadInput, match=r"pip install 'vavae-fast\[data\]'"):
        open_images(tmp_path / name if name == "x.parquet" else tmp_path)


@pytest.mark.parametrize("label", [-5, 1 << 40])
def test_labels_of_a_table_that_are_no_classes_are_named(tmp_path, label):
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'vavae-fast[data]'")
    write_parquet(tmp_path / "a.parquet", [0], [label])
    with pytest.raises(BadInput, match=f"a.parquet: row 0 has the label {label}"):
        open_images(tmp_path / "a.parquet", size=8)


def test_a_damaged_row_group_is_named_when_it_is_read(tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'vavae-fast[data]'")
    path = tmp_path / "a.parquet"
    write_parquet(path, [0], [0])
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(60) + data[64:])
    with pytest.raises(BadInput, match="a.parquet: not a readable parquet file"):
        open_images(path, size=8).read([0])
