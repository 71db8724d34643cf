"""Unreadable images in training: named, counted, replaced by what the counters say, and an error when there are too many."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vavae_fast.data import ImageStream, Share, open_images
from vavae_fast.errors import BadInput

N, BAD = 12, (2, 7)


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (17, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for k in range(N):
        (tmp_path / f"class{k % 3}").mkdir(exist_ok=True)
        (tmp_path / f"class{k % 3}" / f"{k:02d}.png").write_bytes(png(k)[:200] if k in BAD else png(k))
    return tmp_path


ALONE = Share(4)


def stream(folder, share=ALONE, crop="random", max_corrupt=0.5, said=None, seed=1):
    return ImageStream(open_images(folder, size=8, crop=crop), seed, share, flip=True, max_corrupt=max_corrupt, say=(said or []).append)


def take(source, count, start=0):
    batches = source.batches(start)
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


@pytest.mark.parametrize("crop", ["random", "center"])
def test_a_substitute_is_a_function_of_seed_and_position(folder, crop):
    straight = take(stream(folder, crop=crop), 9)
    resumed = take(stream(folder, crop=crop), 2, start=7)
    assert torch.equal(resumed[0].pixels, straight[7].pixels) and torch.equal(resumed[1].labels, straight[8].labels)
    for world in (2, 4):
        shares = [take(stream(folder, Share(4, rank, world, 1), crop), 9 * 4 // world) for rank in range(world)]
        micro = 4 // world
        for step in range(9):
            parts = [share[step * micro + k] for share in shares for k in range(micro)]
            assert torch.equal(torch.cat([part.pixels for part in parts]), straight[step].pixels)
            assert torch.equal(torch.cat([part.labels for part in parts]), straight[step].labels)
    other = take(stream(folder, crop=crop, seed=2), 9)
    assert not torch.equal(torch.cat([b.pixels for b in other]), torch.cat([b.pixels for b in straight]))


def test_readable_images_are_as_without_the_bad_ones_and_labels_are_the_substitutes(folder):
    images = open_images(folder, size=8)
    bad = [k for k, name in enumerate(images.names) if int(name[-6:-4]) in BAD]
    source = stream(folder, crop="center")
    for batch in take(source, 9):
        indices, mirrored = source._order(batch.index.numpy())
        for row, (index, turn) in enumerate(zip(indices, mirrored)):
            shown = batch.pixels[row].flip(-1) if turn else batch.pixels[row]
            found = [k for k in range(N) if k not in bad and torch.equal(images.read([k])[0], shown)]
            assert len(found) == 1 and batch.labels[row] == images.labels[found[0]]
            assert found == [index] or index in bad
    assert source.corrupt == set(bad)


def test_each_is_named_once(folder):
    said = [""]
    take(stream(folder, said=said), 12)
    assert len(said) == 1 + len(BAD)
    assert all(line.startswith("left out and replaced: ") and "damaged image" in line for line in said[1:])
    assert {line.split(".png")[0][-2:] for line in said[1:]} == {"02", "07"}


def test_names_end_before_they_fill_the_log(tmp_path, monkeypatch):
    from vavae_fast.data import streams

    monkeypatch.setattr(streams, "_NAMED", 2)
    for k in range(12):
        (tmp_path / f"{k:02d}.png").write_bytes(png(k)[:200] if k < 4 else png(k))
    said = [""]
    source = stream(tmp_path, said=said)
    take(source, 12)
    assert len(source.corrupt) == 4 and len(said) == 3 and said[2].endswith("(those that follow are counted, not named)")


@pytest.mark.parametrize("max_corrupt, allowed", [(0.0, 0), (0.1, 1)])
def test_too_many_are_an_error_that_counts_and_names(folder, max_corrupt, allowed):
    found = f"({allowed + 1}|{len(BAD)})"  # another thread may have met the next one by then
    reason = rf"{found} of {N} images cannot be read, {allowed} may be.*damaged image.*raise data.max_corrupt"
    with pytest.raises(BadInput, match=reason) as caught:
        take(stream(folder, max_corrupt=max_corrupt), 12)
    assert "\n" not in str(caught.value)


def test_nothing_readable_is_an_error_even_when_all_may_be_corrupt(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(png(k)[:200])
    with pytest.raises(BadInput, match="others in its place were unreadable too"):
        take(stream(tmp_path, max_corrupt=1.0), 1)


def test_reading_and_extraction_do_not_replace(folder):
    images = open_images(folder, size=8)
    with pytest.raises(BadInput, match="damaged image"):
        images.read(range(N))
    with pytest.raises(BadInput, match="damaged image"):
        list(images.batches(4))


def test_check_allows_as_many_as_it_is_told(folder):
    images = open_images(folder, size=8)
    assert images.check(decode_all=True, allowed=2).bad == 2
    with pytest.raises(BadInput, match="2 of 12 images are bad"):
        images.check(decode_all=True, allowed=1)
