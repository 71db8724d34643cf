"""What is written: the reference's format, exact statistics, and the same bytes however it was interrupted."""

import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vavae_fast.artifacts import sha256
from vavae_fast.data import LatentWriter, latent_statistics, open_latents
from vavae_fast.errors import BadInput

SHAPE, COUNT, SIZE = (3, 2, 2), 23, 5
FACTS = {"tokenizer": {"sha256": "ab"}, "seed": 0}


def source(shape=SHAPE, count=COUNT):
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, *shape, generator=g) * 3 + 1, torch.randn(count, *shape, generator=g), torch.arange(count) % 7


def writer(folder, **options):
    return LatentWriter(folder, **{"shape": SHAPE, "count": COUNT, "shard_size": SIZE, "facts": FACTS, **options})


def feed(target, batch, until=None):
    latents, mirrored, labels = source(target.shape, target.count)
    indices = target.indices[: until or len(target.indices)]
    for start in range(target.done, len(indices), batch):
        chosen = indices[start : start + batch]
        target.append(latents[chosen], mirrored[chosen], labels[chosen])
    return target


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
    feed(writer(tmp_path / "x"), 4, until=stop)  # the process dies here: what was buffered is lost
    (tmp_path / "x").mkdir(exist_ok=True)
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
    assert again.done == number * SIZE
    assert digests(feed(again, 4).close()) == before


def test_a_finished_folder_is_left_alone(straight):
    times = {path: path.stat().st_mtime_ns for path in straight.iterdir()}
    again = writer(straight)
    assert again.done == COUNT
    again.close()
    assert times == {path: path.stat().st_mtime_ns for path in straight.iterdir()}


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_folder_does_not_depend_on_the_number_of_processes(tmp_path, straight, world):
    writers = [writer(tmp_path / "x", rank=rank, world=world) for rank in range(world)]
    assert np.array_equal(np.sort(np.concatenate([w.indices for w in writers])), np.arange(COUNT))
    for target in writers[1:]:
        feed(target, 4).close()
    with pytest.raises(BadInput, match="shard00[01].*no such|extraction|no .safetensors|latents"):
        open_latents(tmp_path / "x")
    feed(writers[0], 4).close()
    assert digests(tmp_path / "x") == digests(straight)


def test_rank_0_does_not_close_over_a_missing_shard(tmp_path):
    target = feed(writer(tmp_path / "x", rank=0, world=2), 4)
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
    with pytest.raises(BadInput, match="image 2 has a NaN"):
        writer(tmp_path / "x").append(bad, mirrored, labels)
    with pytest.raises(BadInput, match="image 0 has a NaN or an infinity as torch.float16"):
        writer(tmp_path / "x", dtype=torch.float16).append(latents, mirrored * 1e6, labels)
    with pytest.raises(BadInput, match="label -1"):
        writer(tmp_path / "x").append(latents, mirrored, labels - 1)
    for wrong in ((latents[:, :2], mirrored, labels), (latents, mirrored[1:], labels), (latents, mirrored, labels[1:])):
        with pytest.raises(ValueError, match="append"):
            writer(tmp_path / "x").append(*wrong)
    with pytest.raises(ValueError, match="more than"):
        writer(tmp_path / "x", count=22).append(latents, mirrored, labels)
    with pytest.raises(ValueError, match="close"):
        writer(tmp_path / "x").close()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("options", [{"shape": (3, 2)}, {"count": 0}, {"shard_size": 0}, {"dtype": torch.float64}, {"rank": 2, "world": 2}])
def test_bad_plans(tmp_path, options):
    with pytest.raises(BadInput):
        writer(tmp_path / "x", **options)


def test_more_than_a_thousand_shards_sort_as_images(tmp_path):
    target = writer(tmp_path / "x", count=2001, shard_size=1)
    names = [target._path(k).name for k in range(2001)]
    assert names == sorted(names)
