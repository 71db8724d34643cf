"""What is written: the reference's format, exact statistics, and the same bytes however it was interrupted."""

import errno
import hashlib
import json
import shutil
import struct
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vavae_fast import rng
from vavae_fast.artifacts import sha256
from vavae_fast.data import LatentStream, LatentWriter, Share, latent_statistics, latent_writer, open_latents, shards
from vavae_fast.data.order import RunOrder
from vavae_fast.errors import BadInput

SHAPE, COUNT, SIZE = (3, 2, 2), 23, 5
FACTS = {"tokenizer": {"sha256": "ab"}, "seed": 0}


def source(shape=SHAPE, count=COUNT):
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, *shape, generator=g) * 3 + 1, torch.randn(count, *shape, generator=g), torch.arange(count) % 7


def writer(folder, **options):
    return LatentWriter(folder, **{"shape": SHAPE, "count": COUNT, "shard_size": SIZE, "facts": FACTS, **options})


def feed(target, batch, until=None):
    """All that the writer has to do, or the images before `until` and then an error: what is not a whole shard is let go."""
    latents, mirrored, labels = source(target.shape, target.count)
    std, mirrored_std = (latents.abs() / 4, mirrored.abs() / 4) if target.std else (None, None)
    with target:
        for start in range(0, len(target.indices), batch):
            chosen = target.indices[start : start + batch]
            chosen = chosen[chosen < (until or COUNT)]
            target.append(latents[chosen], mirrored[chosen], labels[chosen], *(t if t is None else t[chosen] for t in (std, mirrored_std)))
    return target


def feed_by(targets, batch):
    """Several processes' writers of one folder, each its share of what is missing; then the first closes."""
    todo = targets[0].todo
    for rank, target in enumerate(targets):
        target.take(todo[rank :: len(targets)])
    hashes = [feed(target, batch).finish() for target in targets]
    return targets[0].close({number: digest for part in hashes for number, digest in part.items()})


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != "manifest.json"}


@pytest.fixture
def straight(tmp_path):
    return feed(writer(tmp_path / "straight"), 4).close()


@pytest.mark.parametrize("shape", [(3, 2, 2), (1, 1, 1), (3, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path, shape, dtype):
    folder = feed(writer(tmp_path / "x", shape=shape, dtype=dtype), 4).close()
    latents, mirrored, labels = source(shape)
    opened = open_latents(folder)
    assert torch.equal(opened.read(range(COUNT)), latents.to(dtype).float())
    assert torch.equal(opened.read(range(COUNT), flip=True), mirrored.to(dtype).float())
    assert torch.equal(opened.labels, labels)
    loaded = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    assert torch.equal(torch.cat([shard["latents"] for shard in loaded]), latents.to(dtype))
    assert torch.equal(torch.cat([shard["latents_flip"] for shard in loaded]), mirrored.to(dtype))
    assert torch.equal(torch.cat([shard["labels"] for shard in loaded]), labels)


def test_format_on_disk(straight):
    names = sorted(path.name for path in straight.iterdir())
    assert names == [f"latents_rank00_shard{k:03d}.safetensors" for k in range(5)] + ["latents_stats.pt", "manifest.json"]
    data = (straight / names[0]).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    assert (8 + length) % 4096 == 0
    assert json.loads(data[8 : 8 + length])["latents"]["data_offsets"][0] == 0
    with safe_open(straight / names[0], framework="pt") as shard:  # as the reference reads it
        assert shard.get_slice("labels").get_shape() == [5] and shard.get_slice("latents")[1:2].shape == (1, *SHAPE)


def test_statistics_are_those_of_all_samples_in_fp64(straight):
    latents = source()[0].double()
    found = torch.load(straight / "latents_stats.pt", weights_only=True)
    assert set(found) == {"mean", "std"}
    for key, expected in (("mean", latents.mean(dim=[0, 2, 3], keepdim=True)), ("std", latents.std(dim=[0, 2, 3], keepdim=True))):
        torch.testing.assert_close(found[key].double(), expected, rtol=2.0**-24 * 1.001, atol=0)
    again = latent_statistics(straight)
    assert all(torch.allclose(found[key], again[key], rtol=2.0**-23, atol=0) for key in found)


def test_manifest_says_what_the_folder_holds(straight):
    manifest = open_latents(straight).manifest
    assert manifest["kind"] == "latents" and manifest["facts"] == FACTS and manifest["count"] == COUNT
    assert [entry["rows"] for entry in manifest["shards"]] == [5, 5, 5, 5, 3]
    for entry in manifest["shards"]:
        path = straight / entry["file"]
        assert (path.stat().st_size, sha256(path)) == (entry["bytes"], entry["sha256"])


@pytest.mark.parametrize("batch", [1, 5, 7, 23])
def test_bytes_do_not_depend_on_the_batches(tmp_path, straight, batch):
    assert digests(feed(writer(tmp_path / "x"), batch).close()) == digests(straight)


@pytest.mark.parametrize("stop", range(1, COUNT))
def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path, straight, stop):
    feed(writer(tmp_path / "x"), 4, until=stop)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [f"latents_rank00_shard{k:03d}.safetensors" for k in range(stop // SIZE)]
    next_shard = f"latents_rank00_shard{stop // SIZE:03d}.safetensors"
    (tmp_path / "x" / f"{next_shard}.tmp").write_bytes(b"half a shard")
    again = writer(tmp_path / "x")
    assert again.done == stop // SIZE * SIZE
    assert digests(feed(again, 3).close()) == digests(straight)


@pytest.mark.parametrize("damage", ["missing", "cut"])
@pytest.mark.parametrize("number", range(5))
def test_a_lost_shard_is_written_again(straight, number, damage):
    before = digests(straight)
    path = straight / f"latents_rank00_shard{number:03d}.safetensors"
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadInput):
        open_latents(straight)
    again = writer(straight)
    assert again.todo == [number] and again.done == COUNT - again.rows(number)
    assert digests(feed(again, 4).close()) == before
    hashes = {entry["file"]: entry["sha256"] for entry in open_latents(straight).manifest["shards"]}
    assert hashes == {path.name: sha256(path) for path in straight.glob("*.safetensors")}


def test_a_finished_folder_is_left_alone(straight):
    times = {path: path.stat().st_mtime_ns for path in straight.iterdir()}
    again = writer(straight)
    assert again.done == COUNT
    again.close()
    assert times == {path: path.stat().st_mtime_ns for path in straight.iterdir()}


@pytest.mark.parametrize("lost", [(), (0,), (1, 3), (4,), (0, 1, 2, 3)])
@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_folder_does_not_depend_on_the_number_of_processes(tmp_path, straight, world, lost):
    """What is missing is shared out evenly, however many wrote what is there; no image twice, none left out."""
    folder = tmp_path / "x"
    if lost:
        shutil.copytree(straight, folder)
        for name in ("manifest.json", "latents_stats.pt", *(f"latents_rank00_shard{k:03d}.safetensors" for k in lost)):
            (folder / name).unlink()
    writers = [writer(folder) for _ in range(world)]
    assert feed_by(writers, 4) == folder
    shares = [set(w.indices.tolist()) for w in writers]
    assert sum(map(len, shares)) == len(set().union(*shares)) == sum(map(writers[0].rows, lost or range(5)))
    assert max(len(w.todo) for w in writers) - min(len(w.todo) for w in writers) <= 1
    assert digests(folder) == digests(straight)


def test_nobody_closes_over_a_missing_shard(tmp_path):
    target = writer(tmp_path / "x")
    target.take([0, 2, 3, 4])
    feed(target, 4)
    with pytest.raises(BadInput, match="shard001.safetensors: missing"):
        target.close()
    assert not (tmp_path / "x" / "latents_stats.pt").exists()


def test_an_interrupted_extraction_is_not_training_data(tmp_path):
    feed(writer(tmp_path / "x"), 4, until=12)
    with pytest.raises(BadInput, match="10 of 23 latents: the extraction was interrupted"):
        open_latents(tmp_path / "x")


def test_planning_writes_nothing(tmp_path):
    assert writer(tmp_path / "x").done == 0
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "options, difference",
    [
        ({"facts": {**FACTS, "tokenizer": {"sha256": "cd"}}}, "facts.tokenizer.sha256=ab, now cd"),
        ({"facts": {**FACTS, "seed": 1}}, "facts.seed=0, now 1"),
        ({"facts": {**FACTS, "more": 1}}, "facts.more=None, now 1"),
        ({"count": 24}, "count=23, now 24"),
        ({"count": 5}, "count=23, now 5"),
        ({"shard_size": 6}, "shard_size=5, now 6"),
        ({"dtype": torch.float16}, "dtype=F32, now F16"),
        ({"shape": (3, 1, 4)}, r"shape=\[3, 2, 2\], now \[3, 1, 4\]"),
        ({"std": True}, "std=False, now True"),
    ],
)
def test_a_folder_made_otherwise_is_refused(straight, options, difference):
    with pytest.raises(BadInput, match=difference):
        writer(straight, **options)


@pytest.mark.parametrize("name", ["latents_rank00_shard000.safetensors", "mine.safetensors"])
def test_a_folder_of_others_is_refused(tmp_path, name):
    save_file({"latents": torch.ones(1, *SHAPE), "latents_flip": torch.ones(1, *SHAPE), "labels": torch.zeros(1).long()}, tmp_path / name)
    with pytest.raises(BadInput, match=f"{name}: not from this program"):
        writer(tmp_path)


def test_bad_values_are_refused_before_they_are_written(tmp_path):
    latents, mirrored, labels = source()
    bad = latents.clone()
    bad[2, 0, 0, 0] = float("nan")
    with pytest.raises(BadInput, match="latents of image 2 has a NaN"):
        writer(tmp_path / "x").append(bad, mirrored, labels)
    with pytest.raises(BadInput, match="latents_flip of image 2, ant/c.png, has a NaN"):
        writer(tmp_path / "x", names=["ant/a.png", "ant/b.png", "ant/c.png"]).append(latents, bad, labels)
    with pytest.raises(BadInput, match="latents_flip of image 0 has a NaN or an infinity as torch.float16"):
        writer(tmp_path / "x", dtype=torch.float16).append(latents, mirrored * 1e6, labels)
    with pytest.raises(BadInput, match="image 0 has the label -1; labels must be 0 or more"):
        writer(tmp_path / "x").append(latents, mirrored, labels - 1)
    writer(tmp_path / "y").append(latents.clamp(1, 3) * 1e38, mirrored, labels)  # which are finite, though their sum is not
    for wrong in ((latents[:, :2], mirrored, labels), (latents, mirrored[1:], labels), (latents, mirrored, labels[1:])):
        with pytest.raises(ValueError, match="append"):
            writer(tmp_path / "x").append(*wrong)
    for options, more in (({"std": True}, ()), ({"std": True}, (latents,)), ({}, (latents, mirrored))):
        with pytest.raises(ValueError, match="append"):
            writer(tmp_path / "x", **options).append(latents, mirrored, labels, *more)
    with pytest.raises(ValueError, match="more than"):
        writer(tmp_path / "x", count=22).append(latents, mirrored, labels)
    with pytest.raises(ValueError, match="close"):
        writer(tmp_path / "x").close()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("options", [{"shape": (3, 2)}, {"count": 0}, {"shard_size": 0}, {"dtype": torch.float64}])
def test_bad_plans(tmp_path, options):
    with pytest.raises(BadInput):
        writer(tmp_path / "x", **options)


def test_more_than_a_thousand_shards_sort_as_images(tmp_path):
    target = writer(tmp_path / "x", count=2001, shard_size=1)
    names = [target.path(k).name for k in range(2001)]
    assert names == sorted(names)


# means with standard deviations


def tensors(folder):
    loaded = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {key: torch.cat([shard[key] for shard in loaded]) for key in loaded[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_means_and_standard_deviations(tmp_path, dtype):
    folder = feed(writer(tmp_path / "x", std=True, dtype=dtype), 4).close()
    latents, mirrored, labels = source()
    expected = dict(latents=latents, latents_flip=mirrored, latents_std=latents.abs() / 4, latents_flip_std=mirrored.abs() / 4)
    found = tensors(folder)
    assert torch.equal(found.pop("labels"), labels) and found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key].to(dtype)) for key in expected)


def test_statistics_of_means_and_standard_deviations_are_those_of_samples(tmp_path):
    """Exactly: the expectation of the unbiased variance of mean + std noise; and about those of 2,000 draws."""
    folder = feed(writer(tmp_path / "x", std=True), 4).close()
    found = torch.load(folder / "latents_stats.pt", weights_only=True)
    latents = source()[0].double().transpose(0, 1).flatten(1)
    std = latents.abs() / 4
    variance = latents.var(dim=1) + std.square().mean(dim=1)
    torch.testing.assert_close(found["std"].double().flatten(), variance.sqrt(), rtol=2e-7, atol=0)
    torch.testing.assert_close(found["mean"].double().flatten(), latents.mean(dim=1), rtol=2e-7, atol=0)
    drawn = latents + std * torch.randn(2000, *std.shape, dtype=torch.float64)
    torch.testing.assert_close(found["std"].double().flatten().square(), drawn.var(dim=2).mean(dim=0), rtol=0.02, atol=0)


@pytest.fixture
def means(tmp_path):
    return open_latents(feed(writer(tmp_path / "means", std=True), 4).close())


def test_means_and_standard_deviations_are_read(means, straight):
    latents, mirrored, _ = source()
    order, flip = [7, 22, 7, 0, 4], [True, False, False, False, True]
    expected = torch.stack([(mirrored if f else latents)[i] for i, f in zip(order, flip)])
    assert means.has_std and torch.equal(means.read(order, flip), expected) and torch.equal(means.read_std(order, flip), expected.abs() / 4)
    again = latent_statistics(means.folder)
    torch.testing.assert_close(again["std"], means.std, rtol=2.0**-22, atol=0)
    samples = open_latents(straight)
    with pytest.raises(BadInput, match="straight: holds no standard deviations; extract with --posterior mean.std"):
        samples.read_std([0])


def test_shards_with_and_without_standard_deviations_do_not_mix(means, straight):
    (straight / "manifest.json").unlink()
    shutil.copy(means.folder / "latents_rank00_shard003.safetensors", straight)
    with pytest.raises(BadInput, match="shard003.safetensors: has other tensors than latents_rank00_shard000.safetensors"):
        open_latents(straight)


def batches(latents, share, count, start=0, **options):
    stream = LatentStream(latents, 3, share, latent_norm=False, **options).batches(start)
    found = [next(stream) for _ in range(count)]
    stream.close()
    return found


def test_training_meets_a_fresh_sample_every_epoch(means):
    """mean + std noise(seed, position), where the same image stands at another position in every epoch."""
    latents, mirrored, _ = source()
    seen = {}
    for batch in batches(means, Share(4), 40):
        indices, flip = RunOrder(3, COUNT)(batch.index.numpy())
        noise = rng.normal(3, batch.index, like=batch.latents, stream=rng.Stream.POSTERIOR)
        mean = torch.stack([(mirrored if f else latents)[i] for i, f in zip(indices, flip)])
        torch.testing.assert_close(batch.latents, mean + mean.abs() / 4 * noise, rtol=1e-6, atol=1e-6)
        for i, f, row in zip(indices.tolist(), flip.tolist(), batch.latents):
            seen.setdefault((i, f), []).append(row)
    again = [rows for rows in seen.values() if len(rows) > 1]
    assert again and not any(torch.equal(rows[0], rows[1]) for rows in again)


def test_samples_do_not_depend_on_processes_start_or_residence(means):
    whole = [batch.latents for batch in batches(means, Share(4), 12)]
    halves = [batches(means, Share(4, rank, 2, micro_batch=1), 24) for rank in (0, 1)]
    for step, expected in enumerate(whole):
        assert torch.equal(torch.cat([half[2 * step + k].latents for half in halves for k in (0, 1)]), expected)
    assert torch.equal(batches(means, Share(4), 1, start=7)[0].latents, whole[7])
    assert torch.equal(batches(means, Share(4), 8, resident="cpu")[7].latents, whole[7])


@pytest.mark.parametrize("stop", [3, 12])
def test_killed_with_standard_deviations(tmp_path, stop):
    whole = feed(writer(tmp_path / "whole", std=True), 4).close()
    feed(writer(tmp_path / "x", std=True), 4, until=stop)
    assert digests(feed(writer(tmp_path / "x", std=True), 3).close()) == digests(whole)


# the thread that writes


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that takes nothing until `may_write` is set."""
    may_write, real = threading.Event(), latent_writer.ShardWriter.append

    def append(shard, block):
        assert may_write.wait(30)
        real(shard, block)

    monkeypatch.setattr(latent_writer.ShardWriter, "append", append)
    return may_write


def test_who_encodes_does_not_wait_for_the_disk(tmp_path, straight, slow_disk):
    """All images are appended while the disk has not taken one."""
    latents, mirrored, labels = source()
    target = writer(tmp_path / "x")
    for k in range(COUNT):
        target.append(latents[k : k + 1], mirrored[k : k + 1], labels[k : k + 1])
    assert not list((tmp_path / "x").glob("*.safetensors"))
    slow_disk.set()
    assert digests(target.close()) == digests(straight)


def test_what_waits_for_the_disk_is_bounded(tmp_path, straight, slow_disk, monkeypatch):
    monkeypatch.setattr(latent_writer, "WAITING_BYTES", 1)  # two blocks at least
    latents, mirrored, labels = source()
    target, appended = writer(tmp_path / "x"), []

    def encode():
        for k in range(COUNT):
            target.append(latents[k : k + 1], mirrored[k : k + 1], labels[k : k + 1])
            appended.append(k)

    encoder = threading.Thread(target=encode)
    encoder.start()
    encoder.join(0.5)
    assert encoder.is_alive() and len(appended) < 4 * SIZE, "one block is being written, two wait, the fourth has no place"
    slow_disk.set()
    encoder.join(30)
    assert len(appended) == COUNT and digests(target.close()) == digests(straight)


def test_a_full_disk_stops_the_encoder(tmp_path, straight, monkeypatch):
    """Soon, by the error of the system with the file's name; what was whole stays, and the same call goes on."""
    real = latent_writer.ShardWriter.append

    def full(shard, block):
        if "shard002" in shard.path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(shard.path))
        real(shard, block)

    with monkeypatch.context() as patch:
        patch.setattr(latent_writer.ShardWriter, "append", full)
        with pytest.raises(OSError, match="No space left on device.*shard002"):
            feed(writer(tmp_path / "x"), 1).close()
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [f"latents_rank00_shard{k:03d}.safetensors" for k in range(2)]
    assert digests(feed(writer(tmp_path / "x"), 4).close()) == digests(straight)


def test_the_system_names_no_file_but_we_do(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.os, "pwrite", full)
    with pytest.raises(OSError) as caught:
        feed(writer(tmp_path / "x"), 4).close()
    assert caught.value.filename.endswith("latents_rank00_shard000.safetensors.tmp") and list((tmp_path / "x").iterdir()) == []


def test_blocks_are_cut_by_the_shard_and_not_by_the_batch(tmp_path):
    """More rows than a block, in shards that are no multiple of one: values, sums and bytes as for any other batch."""
    latents = torch.randn(700, 1, 1, 1)
    folders = []
    for batch in (1, 97, 700):
        target = LatentWriter(tmp_path / str(batch), (1, 1, 1), 700, shard_size=300)
        for rows in latents.split(batch):
            target.append(rows, -rows, torch.zeros(len(rows)))
        folders.append(target.close())
    assert digests(folders[0]) == digests(folders[1]) == digests(folders[2])
    assert torch.equal(open_latents(folders[0]).read(range(700)), latents)
    torch.testing.assert_close(open_latents(folders[0]).std.flatten().double(), latents.double().std().view(1), rtol=2.0**-23, atol=0)


def test_what_killed_writers_left_is_swept_away(tmp_path):
    litter = tmp_path / "latents_rank00_shard007.safetensors.tmp"
    litter.write_bytes(b"half")
    (tmp_path / "mine.tmp").write_bytes(b"mine")
    writer(tmp_path).sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tmp"]


@pytest.mark.parametrize("std", [False, True])
def test_a_flipped_bit_anywhere_in_a_shard_is_found_or_changes_nothing(tmp_path, std):
    """Rows by their sums, labels by theirs, our JSON by its seal, the rest of the header because it no longer fits."""
    folder = feed(writer(tmp_path / "latents", std=std), 4).close()

    def read():
        latents, rows = open_latents(folder), np.arange(COUNT)
        parts = [latents.read(rows), latents.read(rows, True), latents.labels]
        parts += [latents.read_std(rows), latents.read_std(rows, True)] if std else []
        return [part.numpy().tobytes() for part in parts], [shard.ours for shard in latents._store.shards]

    expected, found, generator = read(), 0, np.random.default_rng(0)
    path = sorted(folder.glob("*.safetensors"))[1]
    data, header = path.read_bytes(), 8 + int.from_bytes(path.read_bytes()[:8], "little")
    places = [*generator.integers(0, 8 * header, 60), *generator.integers(8 * header, 8 * len(data), 60), *range(8 * (len(data) - 8), 8 * len(data))]
    for bit in map(int, places):
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        try:
            assert read() == expected, bit
        except BadInput as error:
            assert path.name in str(error)
            found += 1
    assert found > len(places) - 10
