"""One set of pictures, laid out in every way we read: the same images, names, classes and order come out."""

import io
import json
import os
import struct
import tarfile
import threading
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from vavae_fast.data import ImageStream, Share, open_images
from vavae_fast.data.crops import center_crop, cut_of
from vavae_fast.errors import BadInput


def picture(seed, width=20, height=17):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(seed, **size):
    buffer = io.BytesIO()
    picture(seed, **size).save(buffer, "PNG")
    return buffer.getvalue()


def cropped(seed, size=8):
    return torch.from_numpy(center_crop(picture(seed), cut_of("center", (20, 17), size, "", (0, 0))).copy()).permute(2, 0, 1)


# "cat-big" sorts after "cat" by components, before "cat/…" as plain text.
TREE = {"cat/b.png": 1, "cat/a.PNG": 0, "cat-big/c.png": 2, "dog/d.png": 3, "dog/deep/e.png": 4}
IN_ORDER = sorted(TREE, key=lambda name: name.split("/"))


def write_folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


WRITERS = {
    "folder": lambda tmp, files: write_folder(tmp / "images", files),
    "tar": lambda tmp, files: write_tar(tmp / "images.tar", files),
    "zip": lambda tmp, files: write_zip(tmp / "images.zip", files),
}


@pytest.fixture(params=WRITERS.values(), ids=WRITERS.keys())
def write(request, tmp_path):
    return lambda files: request.param(tmp_path, files)


def test_every_layout_gives_the_same_images_in_path_order(write):
    images = open_images(write({name: png(seed) for name, seed in TREE.items()} | {"cat/notes.txt": b"x", ".DS_Store": b"x"}), size=8)
    assert images.names == IN_ORDER and len(images) == 5
    assert images.classes == ["cat", "cat-big", "dog"]
    assert images.labels.dtype == torch.int64 and images.labels.tolist() == [0, 0, 1, 2, 2]
    pixels = images.read([4, 0, 0, 2])
    assert pixels.dtype == torch.uint8 and pixels.shape == (4, 3, 8, 8)
    expected = [cropped(TREE[IN_ORDER[k]]) for k in (4, 0, 0, 2)]
    assert torch.equal(pixels, torch.stack(expected))
    assert images.read(torch.empty(0, dtype=torch.int64)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    "names, classes, labels",
    [
        (["1.png", "2.png"], [], [-1, -1]),
        (["dog/1.png", "dog/2.png"], ["dog"], [0, 0]),
        (["train/1.png", "train/2.png"], [], [-1, -1]),
        (["train/n01/1.JPEG", "train/n02/1.JPEG"], ["n01", "n02"], [0, 1]),
        (["ILSVRC/Data/CLS-LOC/train/n01/1.JPEG", "ILSVRC/Data/CLS-LOC/train/n02/1.JPEG"], ["n01", "n02"], [0, 1]),
        (["n01/images/1.png", "n02/images/1.png"], ["n01", "n02"], [0, 1]),
        (["1.png", "cat/1.png", "dog/1.png"], ["cat", "dog"], [-1, 0, 1]),
    ],
)
def test_classes_come_from_the_first_folder_that_tells_images_apart(write, names, classes, labels):
    images = open_images(write({name: png(0) for name in names}), size=8)
    assert (images.names, images.classes, images.labels.tolist()) == (names, classes, labels)


def test_two_splits_are_not_two_classes(write):
    with pytest.raises(BadInput, match="splits test, train"):
        open_images(write({"train/cat/1.png": png(0), "test/cat/1.png": png(1)}))


def test_webdataset_labels(write):
    images = open_images(write({"000001.png": png(0), "000001.cls": b"7\n", "000000.png": png(1), "000000.cls": b"2"}), size=8)
    assert images.labels.tolist() == [2, 7] and images.classes == [str(k) for k in range(8)]


def test_edm2_labels(write):
    table = json.dumps({"labels": [["00000/a.png", 3], ["00001/b.png", 1]]}).encode()
    images = open_images(write({"00000/a.png": png(0), "00001/b.png": png(1), "dataset.json": table}), size=8)
    assert images.labels.tolist() == [3, 1] and images.classes == ["0", "1", "2", "3"]


@pytest.mark.parametrize("extra", [
    {"1.cls": b"cat"}, {"1.cls": b"9" * 30}, {"dataset.json": b"{}"}, {"dataset.json": b'{"labels": [1, 2]}'},
    *({"dataset.json": b'{"labels": [["1.png", %s]]}' % label} for label in (b"true", b"6.5", b'"3"', b"-5", b"1e999", b"1000000000000000000")),
    {"dataset.json": b'{"labels": [["1.png", 1], ["1.png", 2]]}'},
])  # fmt: skip
def test_broken_label_files_are_named(write, extra):
    with pytest.raises(BadInput, match=next(iter(extra))):
        open_images(write({"1.png": png(0)} | extra))


def test_a_folder_of_tar_shards_is_one_set(tmp_path):
    write_tar(tmp_path / "b.tar", {"0.png": png(0), "0.cls": b"1"})
    write_tar(tmp_path / "a.tar", {"0.png": png(1), "0.cls": b"0", "1.png": png(2), "1.cls": b"1"})
    images = open_images(tmp_path, size=8)
    assert images.names == ["a.tar/0.png", "a.tar/1.png", "b.tar/0.png"] and images.labels.tolist() == [0, 1, 1]
    assert torch.equal(images.read([2]), cropped(0)[None])


def test_shards_with_class_folders_keep_the_folders_as_classes(tmp_path):
    write_tar(tmp_path / "a.tar", {"cat/0.png": png(0)})
    write_tar(tmp_path / "b.tar", {"cat/1.png": png(0), "dog/1.png": png(0)})
    assert open_images(tmp_path).classes == ["cat", "dog"]


# ways in which a source is bad


def test_nothing_is_extracted(tmp_path):
    open_images(write_tar(tmp_path / "x.tar", {"cat/1.png": png(0)}), size=8).read([0])
    assert os.listdir(tmp_path) == ["x.tar"]


@pytest.mark.parametrize("name", ["../1.png", "/1.png", "a/../../1.png", "..\\1.png", "C:/1.png"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_members_that_lead_out_are_refused_by_name(tmp_path, kind, name):
    with pytest.raises(BadInput, match="leads out") as caught:
        open_images(WRITERS[kind](tmp_path, {"0.png": png(0), name: png(1)}))
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("1.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(BadInput, match=r"'1.png' is a link, a device"):
        open_images(tmp_path / "x.tar")


def test_links_in_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("1.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(BadInput, match="is a link"):
        open_images(tmp_path / "x.zip")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_name_that_occurs_twice_is_refused(tmp_path, kind):
    path = WRITERS[kind](tmp_path, {"./1.png": png(0), "1.png": png(1)})
    with pytest.raises(BadInput, match="occurs twice"):
        open_images(path)


def test_a_tar_cut_short_is_named(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"1.png": png(0, width=90, height=90)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BadInput, match="cut short inside member 1.png"):
        open_images(path)


def test_a_zip_member_with_a_wrong_checksum_is_named(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.png", png(0))
    data = bytearray(path.read_bytes())
    data[80] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match="member 1.png cannot be read"):
        open_images(path, size=8).read([0])


def test_links_out_of_a_folder_are_refused_and_links_within_are_followed(tmp_path):
    write_folder(tmp_path / "images", {"cat/1.png": png(0)})
    write_folder(tmp_path / "other", {"2.png": png(1)})
    (tmp_path / "images/cat/2.png").symlink_to("1.png")
    assert len(open_images(tmp_path / "images")) == 2
    (tmp_path / "images/dog").symlink_to(tmp_path / "other")
    with pytest.raises(BadInput, match="dog: a link that leaves"):
        open_images(tmp_path / "images")


@pytest.mark.parametrize("target", ["cat", "loop", "missing.png"])
def test_links_to_folders_loops_and_broken_links_are_refused(tmp_path, target):
    write_folder(tmp_path, {"cat/1.png": png(0)})
    (tmp_path / "loop").symlink_to(target)
    with pytest.raises(BadInput, match="loop: a link to a folder, a broken link"):
        open_images(tmp_path)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (dict(path="missing"), "no such file or folder"),
        (dict(path="empty"), "no images"),
        (dict(path="texts"), "no images"),
        (dict(path="x.tar.gz"), "decompress it first"),
        (dict(path="x.txt"), "expected a folder"),
        (dict(path="junk.tar"), "not a readable uncompressed tar"),
        (dict(path="junk.zip"), "not a readable zip"),
        (dict(path="texts", size=0), "size"),
        (dict(path="texts", crop="middle"), "crop"),
        (dict(path="texts", backend="cuda"), "backend"),
        (dict(path="builtin:letters"), "no such builtin"),
        (dict(path="builtin:digits", size=20), "multiple of 8"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, arguments, reason):
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "texts", {"a.txt": b"x"})
    for name in ("x.tar.gz", "x.txt", "junk.tar", "junk.zip"):
        (tmp_path / name).write_bytes(b"junk" * 300)
    path = arguments.pop("path")
    with pytest.raises(BadInput, match=reason) as caught:
        open_images(path if path.startswith("builtin") else tmp_path / path, **arguments)
    assert "\n" not in str(caught.value)


def test_dali_is_refused_with_a_cure(monkeypatch):
    monkeypatch.setattr("vavae_fast.data.dali.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="backend 'dali'.*use backend 'pil'"):
        open_images("builtin:digits", backend="dali")


@pytest.mark.parametrize("indices, error", [([5], IndexError), ([-1], IndexError), ([0.5], BadInput), ([[0]], BadInput)])
def test_bad_indices(tmp_path, indices, error):
    images = open_images(write_folder(tmp_path, {f"{k}.png": png(k) for k in range(5)}), size=8)
    with pytest.raises(error):
        images.read(indices)


# reading, checking, batches


def test_check_counts_the_bad_and_names_the_first(tmp_path):
    files = {f"{k}.png": png(k) for k in range(6)} | {"7.png": png(7, width=4, height=4)}
    images = open_images(write_folder(tmp_path, files), size=8)
    found = images.check(decode_all=True)
    assert (found.images, found.enlarged, found.converted) == (7, 1, 0)
    cut = png(2)[:300]
    write_folder(tmp_path, {"2.png": cut, "4.png": b"junk"})
    with pytest.raises(BadInput, match=r"4\.png: not an image"):
        images.check()  # headers alone do not see that 2.png is cut
    with pytest.raises(BadInput, match=r"2\.png: damaged image.*2 of 7 images are bad"):
        images.check(decode_all=True)
    with pytest.raises(BadInput, match=r"2\.png: damaged image"):
        images.read(range(7))


def test_batches_cover_the_images_in_order_and_stop_at_borders(tmp_path):
    images = open_images(write_folder(tmp_path, {f"{k:02d}.png": png(k) for k in range(11)}), size=8)
    sizes = [len(batch.index) for batch in images.batches(4, start=2, border=5)]
    assert sizes == [3, 4, 1, 1]
    batches = list(images.batches(4))
    assert torch.equal(torch.cat([b.index for b in batches]), torch.arange(11))
    assert torch.equal(torch.cat([b.pixels for b in batches]), images.read(range(11)))
    chosen = [batch.index.tolist() for batch in images.batches(2, indices=[9, 1, 5])]
    assert chosen == [[9, 1], [5]]
    assert list(images.batches(4, start=11)) == []


def test_random_crops_depend_on_seed_and_counter_alone(tmp_path):
    images = open_images(write_folder(tmp_path, {f"{k}.png": png(k, width=40, height=30) for k in range(3)}), size=8, crop="random")
    together = images.read([0, 1, 2], seed=3, counters=torch.tensor([10, 11, 12]))
    alone = images.read([1], seed=3, counters=torch.tensor([11]))
    assert torch.equal(together[1:2], alone)
    crops = {images.read([0], seed=0, counters=torch.tensor([c])).numpy().tobytes() for c in range(40)}
    assert len(crops) >= 3  # 11 x 8 at short side 8: four places
    with pytest.raises(BadInput, match="counters"):
        open_images(tmp_path, size=8).read([0], counters=torch.tensor([0]))


def test_fingerprint_follows_names_and_labels(tmp_path):
    first = open_images(write_folder(tmp_path / "a", {"cat/1.png": png(0), "dog/1.png": png(1)})).fingerprint()
    assert open_images(tmp_path / "a", size=8).fingerprint() == first
    assert open_images(write_folder(tmp_path / "b", {"cat/1.png": png(0), "dog/2.png": png(1)})).fingerprint() != first


def take(stream, steps, start=0):
    batches, source = [], stream.batches(start)
    for _ in range(steps * stream.share.batches_per_step):
        batches.append(next(source))
    source.close()
    return batches


@pytest.mark.parametrize("world", [1, 2, 4])
def test_image_stream_sees_the_same_global_batches_on_any_world(tmp_path, world):
    images = open_images(write_folder(tmp_path, {f"{k}.png": png(k, width=24, height=16) for k in range(6)}), size=8, crop="random")
    straight = take(ImageStream(images, 1, Share(4), flip=True), 3)
    shares = [take(ImageStream(images, 1, Share(4, rank, world, 1), flip=True), 3) for rank in range(world)]
    micro = 4 // world
    for step in range(3):
        parts = [share[step * micro + k] for share in shares for k in range(micro)]
        assert torch.equal(torch.cat([part.pixels for part in parts]), straight[step].pixels)
        assert torch.equal(torch.cat([part.labels for part in parts]), straight[step].labels)
        assert torch.equal(torch.cat([part.index for part in parts]), torch.arange(4 * step, 4 * step + 4))
    resumed = take(ImageStream(images, 1, Share(4), flip=True), 1, start=2)
    assert torch.equal(resumed[0].pixels, straight[2].pixels)


def test_an_image_stream_s_batches_are_on_the_images_device(tmp_path):
    images = open_images(write_folder(tmp_path, {f"{k}.png": png(k) for k in range(4)}), size=8, crop="random")
    images.device = torch.device("meta")
    (batch,) = take(ImageStream(images, 1, Share(4)), 1)
    assert batch.pixels.device == batch.index.device == images.device and batch.pixels.shape == (4, 3, 8, 8)


def test_an_image_stream_reads_the_next_step_while_one_is_at_work(tmp_path, monkeypatch):
    """However many micro-batches it has: they are asked for at once, and nothing happens on a GPU before the last."""
    images = open_images(write_folder(tmp_path, {f"{k}.png": png(k) for k in range(4)}), size=8, crop="random")
    read, done = [], threading.Event()
    try_read = images.try_read

    def counted(*args):
        read.append(try_read(*args))
        if len(read) == 2 * 6:
            done.set()
        return read[-1]

    monkeypatch.setattr(images, "try_read", counted)
    batches = ImageStream(images, 1, Share(6, micro_batch=1)).batches()
    for _ in range(6):
        next(batches)
    assert done.wait(20)
    batches.close()


def test_a_zip_whose_directory_lies_about_a_size_unfolds_no_further(tmp_path):
    """100 MB of zeros in 100 kB, 1,000 bytes by the directory."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", bytes(100_000_000))
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data[:1000] + data[1000:].replace(struct.pack("<I", 100_000_000), struct.pack("<I", 1000)))
    images = open_images(tmp_path / "a.zip", size=8)
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="a.zip: member 1.png cannot be read"):
            images.read([0])
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_a_tar_with_a_name_of_gigabytes_is_refused(tmp_path):
    member = tarfile.TarInfo("long")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 7 << 30
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(20 * 512))
    with pytest.raises(BadInput, match="a.tar: not a readable uncompressed tar .a name or a header of 7516192768 bytes"):
        open_images(tmp_path / "a.tar")


def test_a_pattern_of_a_trillion_shards_is_refused_at_once(tmp_path):
    for name in ("a-{0..999999999}.tar", "a-{0..9999}-{0..9999}.tar"):
        with pytest.raises(BadInput, match="stands for more than 100,000 shards"):
            open_images(tmp_path / name)
