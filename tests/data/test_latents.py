"""Shards of both kinds read the same; what is wrong with a file is said at once and by name."""

import json
import pickle
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vavae_fast.data import LatentStream, Share, latent_statistics, open_latents, resident, write_statistics
from vavae_fast.data.shards import KEYS
from vavae_fast.errors import BadInput

SHAPE = (3, 4, 4)


def shard(rows, seed=0, shape=SHAPE, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {
        "latents": (torch.randn(rows, *shape, generator=g) * 2 + 1).to(dtype),
        "latents_flip": (torch.randn(rows, *shape, generator=g) * 2 + 1).to(dtype),
        "labels": torch.randint(0, 10, (rows,), generator=g),
    }


def name(number):
    return f"latents_rank{number:02d}_shard000.safetensors"


def write_reference_folder(folder, shards, statistics=True):
    """As the reference writes it: safetensors.save_file with its three metadata, statistics by torch.save."""
    folder.mkdir(exist_ok=True)
    for number, tensors in enumerate(shards):
        metadata = {"total_size": str(len(tensors["labels"])), "dtype": "torch.float32", "device": "cpu"}
        save_file(tensors, str(folder / name(number)), metadata=metadata)
    if statistics:
        latents = torch.cat([tensors["latents"] for tensors in shards]).float()
        dims = dict(dim=[0, 2, 3], keepdim=True)
        torch.save({"mean": latents.mean(**dims), "std": latents.std(**dims)}, folder / "latents_stats.pt")
    return folder


@pytest.fixture
def shards():
    return [shard(5, 0), shard(1, 1), shard(7, 2)]


@pytest.fixture
def folder(tmp_path, shards):
    return write_reference_folder(tmp_path / "latents", shards)


def joined(shards, key):
    return torch.cat([tensors[key] for tensors in shards]).float() if key != "labels" else torch.cat([t[key] for t in shards])


def test_reads_what_the_reference_wrote(folder, shards):
    before = sorted(folder.iterdir())
    latents = open_latents(str(folder))
    assert len(latents) == 13 and latents.shape == SHAPE and latents.channels == 3 and latents.manifest is None
    assert latents.labels.dtype == torch.int64 and torch.equal(latents.labels, joined(shards, "labels"))
    statistics = torch.load(folder / "latents_stats.pt", weights_only=True)
    assert torch.equal(latents.mean, statistics["mean"]) and torch.equal(latents.std, statistics["std"])
    assert torch.equal(latents.read(range(13)), joined(shards, "latents"))
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_come_in_the_order_asked(tmp_path, dtype):
    shards = [shard(rows, seed, dtype=dtype) for seed, rows in enumerate((5, 1, 7))]
    latents = open_latents(write_reference_folder(tmp_path / "x", shards))
    plain, mirrored = joined(shards, "latents"), joined(shards, "latents_flip")
    rng = np.random.default_rng(0)
    for _ in range(20):
        indices = rng.integers(0, 13, 9)
        flip = rng.integers(0, 2, 9).astype(bool)
        expected = torch.where(torch.from_numpy(flip)[:, None, None, None], mirrored[indices], plain[indices])
        for kind in (list, np.asarray, torch.as_tensor):
            found = latents.read(kind(indices), flip=kind(flip))
            assert found.dtype == torch.float32 and torch.equal(found, expected)
        out = torch.empty(9, *SHAPE)
        assert latents.read(indices, flip, out) is out and torch.equal(out, expected)
    assert torch.equal(latents.read([3, 12], flip=True), mirrored[[3, 12]])
    assert torch.equal(latents.read([3, 12], flip=False), plain[[3, 12]])
    assert latents.read([]).shape == (0, *SHAPE)


def test_what_is_read_is_a_private_copy(folder):
    latents = open_latents(folder)
    first = latents.read([0, 1])
    kept = first.clone()
    first.zero_()
    assert torch.equal(latents.read([0, 1]), kept)


def test_threads_share_one_reader(folder, shards):
    latents, expected = open_latents(folder), joined(shards, "latents")

    def work(seed):
        indices = np.random.default_rng(seed).integers(0, 13, 50)
        return torch.equal(latents.read(indices), expected[indices])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(100)))


@pytest.mark.parametrize("indices, flip, error", [
    ([13], None, IndexError), ([-1], None, IndexError), ([0.0], None, BadInput), ([0, 1], [True], BadInput), ([0], [1], BadInput),
    ([2**70], None, IndexError), ([2**63, -1], None, IndexError), ([-(2**70), 0], None, IndexError), ([[0], [1, 2]], None, BadInput),
    ([None], None, BadInput), (None, None, BadInput), ([0, 1], [[True], [True, False]], BadInput), ([0], "x", BadInput),
    (torch.zeros(1, dtype=torch.bfloat16), None, BadInput), ([2**70, 0.5], None, BadInput),
])  # fmt: skip
def test_bad_requests(folder, indices, flip, error):
    with pytest.raises(error) as caught:
        open_latents(folder).read(indices, flip)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{folder}: ")
    with pytest.raises(BadInput, match="out must be"):
        open_latents(folder).read([0], out=torch.empty(2, *SHAPE))


# statistics


def test_statistics_are_exact_over_all_samples(folder, shards):
    latents = joined(shards, "latents").double()
    found = latent_statistics(folder)
    for key, expected in (("mean", latents.mean(dim=[0, 2, 3], keepdim=True)), ("std", latents.std(dim=[0, 2, 3], keepdim=True))):
        assert found[key].dtype == torch.float32 and found[key].shape == (1, 3, 1, 1)
        # fp64 sums of 208 values err by some 1e-14 relative: the float32 beside the right one at most
        torch.testing.assert_close(found[key].double(), expected, rtol=2.0**-24 * 1.001, atol=0)


def test_statistics_survive_a_mean_far_from_zero(tmp_path):
    """A one-pass sum of squares would lose every digit of a std of 1 beside a mean of 1e6."""
    far = shard(600)
    far["latents"] = far["latents"] + 1e6
    found = latent_statistics(write_reference_folder(tmp_path / "x", [far], statistics=False))
    expected = far["latents"].double().std(dim=[0, 2, 3], keepdim=True)
    torch.testing.assert_close(found["std"].double(), expected, rtol=2.0**-23, atol=0)


def test_missing_statistics_name_the_command_that_makes_them(tmp_path, shards):
    folder = write_reference_folder(tmp_path / "x", shards, statistics=False)
    with pytest.raises(BadInput) as caught:
        open_latents(folder)
    assert "no latents_stats.pt" in str(caught.value) and f"vavae-fast extract --stats-only --out {folder}" in str(caught.value)
    write_statistics(folder, latent_statistics(folder))
    assert open_latents(folder).mean.shape == (1, 3, 1, 1)
    assert [path.suffix for path in sorted(folder.iterdir())] == [".safetensors"] * 3 + [".pt"]


ONE = torch.ones(1, 3, 1, 1)
BAD_STATISTICS = {
    "other channels": {"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)},
    "flat": {"mean": torch.zeros(3), "std": torch.ones(3)},
    "no std": {"mean": ONE},
    "a list": [ONE, ONE],
    "numbers": {"mean": 0.0, "std": 1.0},
    "integers": {"mean": ONE.long(), "std": ONE.long()},
    "zero std": {"mean": ONE, "std": ONE * torch.tensor([1.0, 0, 1]).view(1, 3, 1, 1)},
    "negative std": {"mean": ONE, "std": -ONE},
    "nan mean": {"mean": ONE * float("nan"), "std": ONE},
    "infinite std": {"mean": ONE, "std": ONE * float("inf")},
}


@pytest.mark.parametrize("value", BAD_STATISTICS.values(), ids=BAD_STATISTICS.keys())
def test_bad_statistics_are_named(folder, value):
    torch.save(value, folder / "latents_stats.pt")
    with pytest.raises(BadInput, match="latents_stats.pt: .*--stats-only"):
        open_latents(folder)


class Payload:
    def __reduce__(self):
        return (print, ("code ran",))


def test_statistics_that_would_run_code_are_refused(folder, capsys):
    torch.save({"mean": Payload(), "std": ONE}, folder / "latents_stats.pt")
    with pytest.raises(BadInput, match="latents_stats.pt: refused.*could run code.*--stats-only"):
        open_latents(folder)
    assert "code ran" not in capsys.readouterr().out


def test_statistics_of_a_foreign_pickle_say_one_line(folder, recwarn):
    """torch.load would warn over several lines of a pickle protocol that the file never chose for itself."""
    (folder / "latents_stats.pt").write_bytes(pickle.dumps({"mean": 0.0, "std": 1.0}, protocol=4))
    with pytest.raises(BadInput, match="latents_stats.pt"):
        open_latents(folder)
    assert not recwarn.list


@pytest.mark.parametrize("data", [b"", b"junk", b"PK\x03\x04junk", b"0" * (2 << 20)])
def test_damaged_statistics_are_named(folder, data):
    (folder / "latents_stats.pt").write_bytes(data)
    with pytest.raises(BadInput, match="latents_stats.pt"):
        open_latents(folder)


# headers


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"latents": entry("F32", [2, 1, 1, 1], 0, 8), "latents_flip": entry("F32", [2, 1, 1, 1], 8, 16), "labels": entry("I64", [2], 16, 32)}


def file_of(header, data=bytes(32), padding=0):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) + padding) + text + b" " * padding + data


def changed(key, **fields):
    return {**GOOD, key: {**GOOD[key], **fields}}


BAD_HEADERS = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "no header": struct.pack("<Q", 0),
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header of 2^63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "not json": file_of(b"<html>"),
    "not utf-8": file_of(b'{"\xff": 1}'),
    "deep": file_of(b"[" * 100_000),
    "a list": file_of([]),
    "no tensors": file_of({}, b""),
    "a key twice": file_of(json.dumps(GOOD).encode()[:-1] + b', "labels": ' + json.dumps(GOOD["labels"]).encode() + b"}"),
    "a key missing": file_of({k: v for k, v in GOOD.items() if k != "latents_flip"}),
    "a key too many": file_of({**GOOD, "moments": entry("F32", [0], 32, 32)}),
    "truncated": file_of(GOOD, bytes(31)),
    "trailing byte": file_of(GOOD, bytes(33)),
    "overlap": file_of(changed("latents_flip", data_offsets=[4, 12]), bytes(28)),
    "hole": file_of(changed("labels", data_offsets=[20, 36]), bytes(36)),
    "backwards": file_of(changed("labels", data_offsets=[32, 16])),
    "negative offsets": file_of(changed("latents", data_offsets=[-8, 0])),
    "three offsets": file_of(changed("latents", data_offsets=[0, 4, 8])),
    "boolean offset": file_of(changed("latents", data_offsets=[False, 8])),
    "float shape": file_of(changed("labels", shape=[2.0])),
    "overflowing shape": file_of(changed("latents", shape=[1 << 62, 1 << 62, 4, 1])),
    "dtype that lies": file_of(changed("latents", dtype="F64")),
    "unknown dtype": file_of(changed("latents", dtype="F8_E4M3")),
    "dtype no text": file_of(changed("latents", dtype=4)),
    "unknown field": file_of(changed("labels", note=1)),
    "entry no object": file_of({**GOOD, "labels": 3}),
    "flip of another dtype": file_of(
        changed("latents_flip", dtype="F16", data_offsets=[8, 12]) | {"labels": entry("I64", [2], 12, 28)}, bytes(28)
    ),
    "flip of another shape": file_of(changed("latents_flip", shape=[1, 2, 1, 1])),
    "rows differ": file_of(changed("labels", shape=[1], data_offsets=[16, 24]), bytes(24)),
    "three dimensions": file_of(changed("latents", shape=[2, 1, 1]) | {"latents_flip": entry("F32", [2, 1, 1], 8, 16)}),
    "float labels": file_of(changed("labels", dtype="F32", data_offsets=[16, 24]), bytes(24)),
    "labels of two dimensions": file_of(changed("labels", shape=[2, 1])),
    "negative label": file_of(GOOD, bytes(24) + struct.pack("<q", -1)),
    "zero rows": file_of({k: {**v, "shape": [0, *v["shape"][1:]], "data_offsets": [0, 0]} for k, v in GOOD.items()}, b""),
    "metadata a list": file_of({**GOOD, "__metadata__": []}),
    "metadata of numbers": file_of({**GOOD, "__metadata__": {"a": 1}}),
    "our metadata broken": file_of({**GOOD, "__metadata__": {"vavae_fast": "[1]"}}),
}


def test_the_good_header_is_good(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(file_of(GOOD, padding=13))
    torch.save({"mean": torch.zeros(1, 1, 1, 1), "std": torch.ones(1, 1, 1, 1)}, tmp_path / "latents_stats.pt")
    assert len(open_latents(tmp_path)) == 2


@pytest.mark.parametrize("data", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_every_malformed_file_is_one_line_that_names_it(folder, data):
    (folder / "latents_rank01_shard000.safetensors").write_bytes(data)
    with pytest.raises(BadInput) as caught:
        open_latents(folder)
    message = str(caught.value)
    assert message.startswith(str(folder / "latents_rank01_shard000.safetensors")) and "\n" not in message


@pytest.mark.parametrize("other", [shard(2, shape=(4, 4, 4)), shard(2, shape=(3, 2, 8)), shard(2, dtype=torch.float16)])
def test_shards_of_different_kinds_do_not_mix(folder, other):
    save_file(other, str(folder / name(9)))
    with pytest.raises(BadInput, match="rank09.*keep the shards of one extraction"):
        open_latents(folder)


def test_folders_without_latents(tmp_path):
    with pytest.raises(BadInput, match="no such folder"):
        open_latents(tmp_path / "x")
    with pytest.raises(BadInput, match="no .safetensors"):
        open_latents(tmp_path)


# what changes under the reader's hands


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_names_shard_and_row(tmp_path, shards, value):
    shards[2]["latents"][4, 1, 2, 3] = value
    folder = write_reference_folder(tmp_path / "x", shards, statistics=False)
    torch.save({"mean": ONE, "std": ONE}, folder / "latents_stats.pt")
    latents = open_latents(folder)
    latents.read([0, 9, 11])
    with pytest.raises(BadInput, match=r"rank02_shard000.safetensors: NaN or infinity in row 4"):
        latents.read([0, 11, 10])


def test_large_finite_values_are_no_infinity(tmp_path, shards):
    shards[0]["latents"][:] = 3e38
    folder = write_reference_folder(tmp_path / "x", shards, statistics=False)
    torch.save({"mean": ONE, "std": ONE}, folder / "latents_stats.pt")
    assert (open_latents(folder).read([0, 1]) == 3e38).all()


@pytest.mark.parametrize("change", ["cut", "rewritten"])
def test_a_shard_that_changes_while_open_is_named(folder, change):
    latents = open_latents(folder)
    latents.read(range(13))
    path = folder / name(2)
    data = path.read_bytes()
    with open(path, "r+b") as file:
        if change == "cut":
            file.truncate(len(data) - 300)
        else:
            file.seek(len(data) - 100)
            file.write(b"x")
            file.flush()
    latents.read([0, 5])
    with pytest.raises(BadInput, match="rank02_shard000.safetensors: changed while it was open"):
        latents.read([0, 12])


# the training input


def take(latents, share, steps, start=0, **options):
    stream = LatentStream(latents, 3, share, **options)
    source = stream.batches(start)
    batches = [next(source) for _ in range(steps * share.batches_per_step)]
    source.close()
    return batches


@pytest.mark.parametrize("world, micro", [(1, None), (1, 2), (2, None), (2, 1), (4, 1)])
def test_stream_gives_every_world_the_same_global_batches(folder, world, micro):
    latents = open_latents(folder)
    straight = take(latents, Share(4), 5)
    shares = [take(latents, Share(4, rank, world, micro), 5) for rank in range(world)]
    per_step = len(shares[0]) // 5
    for step in range(5):
        parts = [share[step * per_step + k] for share in shares for k in range(per_step)]
        for field in ("latents", "labels", "index"):
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(straight[step], field))


def test_stream_meets_every_sample_once_an_epoch_and_flips_half(folder, shards):
    latents = open_latents(folder)
    plain, mirrored = joined(shards, "latents"), joined(shards, "latents_flip")
    rows = torch.cat([batch.latents for batch in take(latents, Share(13), 40, latent_norm=False)]).view(40, 13, -1)
    is_plain = (rows[:, :, None] == plain.flatten(1)).all(-1)
    is_mirrored = (rows[:, :, None] == mirrored.flatten(1)).all(-1)
    assert ((is_plain | is_mirrored).sum(1) == 1).all()  # each of the 13, once in each of 40 epochs
    share = is_mirrored.sum() / (40 * 13)
    assert abs(share - 0.5) < 4 * 0.5 / (40 * 13) ** 0.5
    unflipped = torch.cat([batch.latents for batch in take(latents, Share(13), 2, latent_norm=False, flip=False)])
    assert (unflipped.flatten(1)[:, None] == plain.flatten(1)).all(-1).any(1).all()


def test_stream_normalises_as_the_reference(folder, shards):
    latents = open_latents(folder)
    raw = take(latents, Share(4), 1, latent_norm=False)[0].latents
    assert torch.equal(take(latents, Share(4), 1)[0].latents, (raw - latents.mean) / latents.std)
    assert torch.equal(take(latents, Share(4), 1, multiplier=0.5)[0].latents, (raw - latents.mean) / latents.std * 0.5)


def test_stream_resumes_where_it_stopped(folder):
    latents = open_latents(folder)
    straight, resumed = take(latents, Share(4), 6), take(latents, Share(4), 2, start=4)
    for a, b in zip(straight[4:], resumed):
        assert torch.equal(a.latents, b.latents) and torch.equal(a.labels, b.labels) and torch.equal(a.index, b.index)


def test_labels_belong_to_their_latents(folder, shards):
    latents, plain = open_latents(folder), joined(shards, "latents").flatten(1)
    for batch in take(latents, Share(4), 4, latent_norm=False, flip=False):
        index = (batch.latents.flatten(1)[:, None] == plain).all(-1).int().argmax(1)
        assert torch.equal(latents.labels[index], batch.labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flip", [True, False])
def test_resident_latents_are_the_streams_to_the_bit(tmp_path, dtype, flip):
    latents = open_latents(write_reference_folder(tmp_path / "l", [shard(5, 1, dtype=dtype), shard(9, 2, dtype=dtype)]))
    for share in (Share(8), Share(8, 1, 2, 2)):
        ours, theirs = (take(latents, share, 4, flip=flip, resident=where) for where in ("cpu", None))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.latents, b.latents) and torch.equal(a.labels, b.labels) and torch.equal(a.index, b.index)


def test_latents_that_do_not_fit_are_refused(folder, monkeypatch):
    monkeypatch.setattr(resident, "_free_bytes", lambda device: 1000)
    with pytest.raises(BadInput, match="of latents do not fit into 1.0 kB of free cpu memory; set data.latents_in=stream"):
        LatentStream(open_latents(folder), 0, Share(4), resident="cpu")


def test_as_many_rows_as_imagenet_open_from_their_headers_alone(tmp_path):
    """128 sparse shards: 84 GB that nobody reads, 10 MB of labels; at most 20 MB in all while they are opened."""
    rows, sizes = 10_010, [4 * 32 * 16 * 16] * 2 + [8]
    ends = np.cumsum([0] + [rows * size for size in sizes]).tolist()
    shapes = [("F32", [rows, 32, 16, 16])] * 2 + [("I64", [rows])]
    header = {key: dict(dtype=dtype, shape=shape, data_offsets=ends[i : i + 2]) for i, (key, (dtype, shape)) in enumerate(zip(KEYS, shapes))}
    text = json.dumps(header).encode()
    for number in range(128):
        with open(tmp_path / name(number), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + ends[-1])
    torch.save({"mean": torch.zeros(1, 32, 1, 1), "std": torch.ones(1, 32, 1, 1)}, tmp_path / "latents_stats.pt")
    open_latents(tmp_path)
    tracemalloc.start()
    try:
        latents = open_latents(tmp_path)
        assert len(latents) == 128 * rows and tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
