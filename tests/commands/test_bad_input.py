"""What a user can get wrong: status 2, one line that names culprit and cure, and not a file more than before."""

import errno
import os
import pickle
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import contents, copy, done, files

from vavae_fast import artifacts
from vavae_fast.cli import main


class Payload:
    """Unpickled, it would make a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.fixture
def box(tmp_path, monkeypatch):
    """An empty folder to be in. The hostile file's marker lies outside it."""
    folder = tmp_path / "box"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def sees_one_line(capsys, argv, words, box=None, where=()):
    """Run it; status 2, one line with all the words, and the same files as before in `box`."""
    before = {folder: files(folder) for folder in (box, *where) if folder}
    capsys.readouterr()
    status = main([str(word) for word in argv])
    said = capsys.readouterr()
    assert status == 2, said.out
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert len(said.err) < 700 and "Traceback" not in said.err
    assert all(word in said.err for word in words), said.err
    for folder, names in before.items():
        assert files(folder) == names
    return said.err


def sampling(tiny, *more):
    return ["sample", *tiny.dit(), "--checkpoint", tiny.dit_run, "--out", "samples", *more]


def extraction(tiny, images, *more):
    return ["extract", "--config", tiny.root / "tokenizer.yaml", "--checkpoint", tiny.tokenizer_run, "--images", images, "--out", "latents", *more]


# Words (with the pipeline at hand) -> what the line must say.
WORDS = {
    "no config": (lambda t: ["train", "--config", "none.yaml"], ["none.yaml: no such config file"]),
    "config is a folder": (lambda t: ["train", "--config", t.root], ["is a folder; give the config file in it"]),
    "config of the other kind": (lambda t: ["train", "--config", t.root / "tokenizer.yaml"], ["needs a LightningDiT config"]),
    "misspelt key": (lambda t: ["train", *t.dit(), "optimizer.learning_rate=1"], ["unknown key optimizer.learning_rate"]),
    "misspelt key, nearest": (lambda t: ["train", *t.dit(), "train.max_step=1"], ["train.max_step", "Did you mean train.max_steps?"]),
    "wrong type": (lambda t: ["train", *t.dit(), "train.max_steps=lots"], ["train.max_steps: expected a whole number", '"lots"']),
    "out of range": (lambda t: ["train", *t.dit(), "optimizer.lr=-1"], ["optimizer.lr: must be above 0, got -1"]),
    "no steps": (lambda t: ["train", *t.dit(), "train.max_steps=null"], ["train.max_steps: must be set"]),
    "model unknown": (lambda t: ["train", *t.dit(), "model.model_type=LightningDiT-H/2"], ["model.model_type", "LightningDiT-XL/1"]),
    "cosine of no velocity": (lambda t: ["train", *t.dit(Path("runs")), "transport.prediction=noise"], ["transport.use_cosine_loss: must be false"]),
    "no latents given": (lambda t: ["train", *t.dit(Path("runs")), "data.data_path=null"], ["data.data_path: not set", "data.data_path=PATH"]),
    "placeholder left": (lambda t: ["train", *t.dit(Path("runs")), "data.data_path=path/to/your/latents"],
                         ['data.data_path is still "path/to/your/latents"']),
    "latents not there": (lambda t: ["train", *t.dit(Path("runs")), "data.data_path=gone"], ["data.data_path: gone does not exist"]),
    "no shards": (lambda t: ["train", *t.dit(Path("runs")), f"data.data_path={t.images}"], ["images: no .safetensors shards", "extract"]),
    "channels": (lambda t: ["train", *t.dit(Path("runs")), "model.in_chans=8"],
                 ["latents have 4 channels, model.in_chans is 8", "set model.in_chans=4"]),
    "moments": (lambda t: ["train", *t.dit(Path("runs")), "model.in_chans=2"], ["moments: mean and log-variance, not latents?"]),
    "size": (lambda t: ["train", *t.dit(Path("runs")), "data.image_size=32"], ["latents are 2 x 2", "is 4; set data.image_size"]),
    "classes": (lambda t: ["train", *t.dit(Path("runs")), "data.num_classes=1"], ["label 1 found, data.num_classes is 1; set data.num_classes=2"]),
    "start weights gone": (lambda t: ["train", *t.dit(Path("runs")), "train.weight_init=gone.pt"], ["train.weight_init: gone.pt does not exist"]),
    "no images given": (lambda t: ["train-tokenizer", *t.tokenizer(Path("runs")), "data.path=null"], ["data.path: not set"]),
    "images not there": (lambda t: ["train-tokenizer", *t.tokenizer(Path("runs")), "data.path=gone"], ["data.path: gone does not exist"]),
    "image placeholder": (lambda t: ["train-tokenizer", *t.tokenizer(Path("runs")), "data.path=/path/to/imagenet"],
                          ['data.path is still "/path/to/imagenet"']),
    "no LPIPS weights": (lambda t: ["train-tokenizer", *t.tokenizer(Path("runs")), "perceptual.standin=null"],
                         ["perceptual.vgg_weights: not set", "vgg16-397923af.pth"]),
    "no foundation weights": (lambda t: ["train-tokenizer", *t.tokenizer(Path("runs")), "model.params.use_vf=dinov2"],
                              ["foundation.weights: not set", "dinov2", "hub"]),
    "no stand-in": (lambda t: ["train-tokenizer", *t.tokenizer(Path("runs")), "foundation.standin=null"], ["foundation.standin: not set"]),
    "stand-in is none": (lambda t: ["train-tokenizer", *t.tokenizer(Path("runs")), f"foundation.standin={t.root / 'dit.yaml'}"],
                         ["dit.yaml: not a whole safetensors file"]),
    "precision unknown": (lambda t: ["train-tokenizer", *t.tokenizer(Path("runs")), "lightning.trainer.precision=16"],
                          ["lightning.trainer.precision: must be 32 or bf16, got 16"]),
    "pixelloss_weight": (lambda t: ["train-tokenizer", *t.tokenizer(Path("runs")), "model.params.lossconfig.params.pixelloss_weight=2.0"],
                         ["pixelloss_weight", "remove the key"]),
    "discriminator too deep": (lambda t: ["train-tokenizer", *t.tokenizer(Path("runs")), "model.params.lossconfig.params.disc_num_layers=3"],
                               ["disc_num_layers", "24 pixels; lower it"]),
    "start weights of another kind": (lambda t: ["train-tokenizer", *t.tokenizer(Path("runs")), f"weight_init={t.dit_run}"],
                                      ["has no discriminator weights"]),
    "no images to extract": (lambda t: ["extract", *t.dit(), "--out", "latents"], ["data.path: not set"]),
    "no tokenizer": (lambda t: ["extract", "--config", t.root / "tokenizer.yaml", "--images", t.images, "--out", "latents"],
                     ["ckpt_path: not set; give the tokenizer's weights"]),
    "no such tokenizer": (lambda t: [*extraction(t, t.images), "--checkpoint", "gone"], ["--checkpoint: gone does not exist"]),
    "too many classes": (lambda t: ["extract", *t.dit(), "data.num_classes=1", "--images", t.images, "--out", "latents"],
                         ["2 class folders, data.num_classes is 1; set data.num_classes=2"]),
    "batch 0": (lambda t: extraction(t, t.images, "--batch", "0"), ["--batch: must be above 0, got 0"]),
    "statistics of nothing": (lambda t: ["extract", *t.dit(), "--out", "latents", "--stats-only"], ["latents: no such folder of shards"]),
    "num 0": (lambda t: sampling(t, "--num", "0"), ["--num: must be above 0, got 0"]),
    "seed -1": (lambda t: sampling(t, "--seed", "-1"), ["--seed: must be 0 or more, got -1"]),
    "labels by name": (lambda t: sampling(t, "--labels", "cat,dog"), ["--labels: 'cat' is no class number; give numbers from 0 to 1"]),
    "labels too high": (lambda t: sampling(t, "--labels", "0,2"), ["--labels: must be in 0 to 1", "got 2"]),
    "labels empty": (lambda t: sampling(t, "--labels", "0,"), ["--labels: '' is no class number"]),
    "sampler unknown": (lambda t: sampling(t, "sample.sampling_method=eular"), ["sample.sampling_method", "euler"]),
    "no checkpoint": (lambda t: ["sample", *t.dit(), "--out", "samples"], ["ckpt_path: not set; give the LightningDiT weights"]),
    "checkpoint placeholder": (lambda t: ["sample", *t.dit(), "ckpt_path=path/to/your.pt", "--out", "samples"], ["ckpt_path is still"]),
    "another architecture": (lambda t: sampling(t, "model.hidden_size=64"), ["does not fit LightningDiT", "32 hidden channels in the file, 64"]),
    "another depth": (lambda t: sampling(t, "model.depth=2"), ["does not fit LightningDiT", "missing: blocks.1", "nothing was loaded"]),
    "another class count": (lambda t: sampling(t, "data.num_classes=9"), ["set data.num_classes"]),
    "guidance without null class": (lambda t: sampling(t, "model.class_dropout_prob=0"), ["sample.cfg_scale: must be 1", "null class"]),
    "tokenizer is the model": (lambda t: sampling(t, f"vae.ckpt_path={t.dit_run}"), ["not of a tokenizer; give a tokenizer's run folder"]),
    "no tokenizer to decode": (lambda t: sampling(t, "vae.ckpt_path=null"), ["vae.ckpt_path: not set; give the tokenizer's weights"]),
    "no statistics": (lambda t: sampling(t, f"data.data_path={t.images}"), ["no latents_stats.pt in", "extract --stats-only"]),
    "samples not there": (lambda t: ["evaluate", "--samples", "gone.npz", "--reference", t.images], ["gone.npz: no such file or folder"]),
    "inception not there": (lambda t: ["evaluate", "--samples", t.images, "--reference", t.images, "--image-size", "16", "--metrics", "is",
                                       "--inception", "gone.pth", "--json", "new/a.json"], ["gone.pth: no such file"]),
    "no LPIPS files": (lambda t: ["evaluate", "--reconstruction", "--config", t.root / "tokenizer.yaml", "--checkpoint", t.tokenizer_run,
                                  "--images", t.images, "--metrics", "lpips"], ["--vgg: missing"]),
    "run not there": (lambda t: ["export", "--run", "gone", "--out", "a.pt"], ["gone: no such run folder"]),
    "run without checkpoints": (lambda t: ["export", "--run", t.images, "--out", "a.pt"], ["holds no complete checkpoint"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WORDS)
def test_words_that_cannot_be_done(tiny, box, capsys, case):
    make, words = WORDS[case]
    sees_one_line(capsys, make(tiny), words, box, [tiny.root])


# -- places that cannot be written ------------------------------------------------------------------------------------

WRITERS = {
    "train-tokenizer": lambda t, out: ["train-tokenizer", *t.tokenizer(out)],
    "extract": lambda t, out: [*extraction(t, t.images), "--out", out],
    "train": lambda t, out: ["train", *t.dit(out)],
    "sample": lambda t, out: [*sampling(t), "--out", out],
    "evaluate": lambda t, out: ["evaluate", "--reconstruction", "--config", t.root / "tokenizer.yaml", "--checkpoint", t.tokenizer_run,
                                "--images", t.images, "--metrics", "psnr", "--json", out / "a.json"],
    "export": lambda t, out: ["export", "--run", t.dit_run, "--out", out / "a.pt"],
}  # fmt: skip


@pytest.mark.parametrize("command", WRITERS)
def test_a_file_where_a_folder_should_be(tiny, box, capsys, command):
    (box / "file").write_text("mine")
    for out in (box / "file" / "out", box / "file"):
        sees_one_line(capsys, WRITERS[command](tiny, out), ["is a file, not a folder; choose another output folder"], box)
    assert (box / "file").read_text() == "mine"


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc here")
def test_a_place_that_takes_no_files(tiny, box, capsys, command):
    """Even for root, who may write everywhere."""
    sees_one_line(capsys, WRITERS[command](tiny, Path("/proc/nowhere")), ["/proc/nowhere", "; "], box)


@pytest.mark.parametrize("command", WRITERS)
def test_a_folder_that_may_not_be_written(tiny, box, capsys, command, monkeypatch):
    monkeypatch.setattr(artifacts.os, "access", lambda *_: False)
    sees_one_line(capsys, WRITERS[command](tiny, box / "out"), [f"cannot write to {box}; choose another"], box)


@pytest.mark.parametrize("command", ["train-tokenizer", "extract", "train", "sample", "export"])
def test_no_space_is_known_beforehand(tiny, box, capsys, command, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(0, 0, 100))
    sees_one_line(capsys, WRITERS[command](tiny, box / "out"), ["needs", "100 B are free; make room"], box)


def whole(folder):
    """No half-written file, no temporary one."""
    for path in folder.rglob("*"):
        assert ".tmp" not in path.name, path
        if path.suffix == ".safetensors":
            load_file(path)
        if path.name == "manifest.json":
            artifacts.read_json(path)


@pytest.mark.parametrize("command", WRITERS)
def test_a_disk_that_fills_up_in_the_middle(tiny, box, capsys, command, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(artifacts, "sync", full)
    assert main([str(word) for word in WRITERS[command](tiny, box / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device; make room" in said
    whole(box)


@pytest.mark.parametrize("command", ["train-tokenizer", "extract", "train", "sample", "export", "export .safetensors"])
def test_files_that_may_not_grow_any_more(tiny, box, capsys, command):
    """The system itself refuses the write, inside whatever library makes it; the line says which file or what to do."""
    words = [str(word) for word in WRITERS[command.split()[0]](tiny, box / "out")]
    if command.endswith(".safetensors"):
        words[-1] = str(box / "out" / "a.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if command == "sample" else 1500 if command == "extract" else 20_000, hard))
    try:
        status = main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1 and "; " in said, said
    whole(box)


# -- damaged and hostile files ----------------------------------------------------------------------------------------


def test_an_empty_folder_of_images(tiny, box, capsys):
    (box / "images").mkdir()
    for argv in (extraction(tiny, "images"), ["train-tokenizer", *tiny.tokenizer(box / "runs"), "data.path=images"]):
        sees_one_line(capsys, argv, ["images"], box)


def test_a_truncated_image_is_named(tiny, box, capsys):
    copy(tiny.images, box / "images")
    bad = box / "images" / "bee" / "3.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(bad)
    bad.write_bytes(bad.read_bytes()[:700])
    sees_one_line(capsys, extraction(tiny, "images"), ["bee/3.jpg"], box)
    sees_one_line(capsys, ["train-tokenizer", *tiny.tokenizer(box / "runs"), "data.path=images"], ["bee/3.jpg"], box)


def damaged(path, how):
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "page": b"<html>not found</html>", "noise": os.urandom(len(data))}[how])


HOW = ("empty", "cut", "page", "noise")


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_shard(tiny, box, capsys, how):
    copy(tiny.latents, box / "latents")
    damaged(box / "latents" / "latents_rank00_shard001.safetensors", how)
    sees_one_line(capsys, ["train", *tiny.dit(box / "runs"), "data.data_path=latents"], ["latents_rank00_shard001.safetensors"], box)


@pytest.mark.parametrize("how", HOW)
def test_damaged_statistics(tiny, box, capsys, how):
    copy(tiny.latents, box / "latents")
    damaged(box / "latents" / "latents_stats.pt", how)
    for argv in (["train", *tiny.dit(box / "runs"), "data.data_path=latents"], sampling(tiny, "data.data_path=latents")):
        sees_one_line(capsys, argv, ["latents_stats.pt", "--stats-only"], box)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_weights(tiny, box, capsys, how, suffix):
    done("export", "--run", str(tiny.dit_run), "--out", f"dit{suffix}")
    done("export", "--run", str(tiny.tokenizer_run), "--out", f"vae{suffix}")
    for name in ("dit", "vae"):
        damaged(box / f"{name}{suffix}", how)
    sees_one_line(capsys, [*sampling(tiny), "--checkpoint", f"dit{suffix}"], [f"dit{suffix}: "], box)
    sees_one_line(capsys, sampling(tiny, f"vae.ckpt_path=vae{suffix}"), [f"vae{suffix}: "], box)
    sees_one_line(capsys, ["train", *tiny.dit(box / "runs"), f"train.weight_init=dit{suffix}"], [f"dit{suffix}: "], box)
    sees_one_line(capsys, ["train-tokenizer", *tiny.tokenizer(box / "runs"), f"weight_init=vae{suffix}"], [f"vae{suffix}: "], box)


@pytest.mark.parametrize("how", HOW)
def test_damaged_inception_weights(tiny, box, capsys, how):
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.ones(32, 3, 3, 3)}, box / "inception.pth")
    damaged(box / "inception.pth", how)
    argv = ["evaluate", "--samples", tiny.images, "--reference", tiny.images, "--image-size", "16", "--metrics", "is", "--inception", "inception.pth"]
    sees_one_line(capsys, argv, ["inception.pth: ", "--inception PATH"], box)


def test_a_damaged_checkpoint_that_was_asked_for(tiny, box, capsys):
    folder = copy(tiny.dit_run, box / "dit") / "checkpoints" / "step_00000004"
    damaged(folder / "ema.safetensors", "noise")
    sees_one_line(capsys, [*sampling(tiny), "--checkpoint", folder], ["ema.safetensors is damaged", "choose another checkpoint"], box)


@pytest.mark.parametrize("how", HOW)
def test_damaged_samples(box, capsys, how):
    np.savez(box / "s.npz", np.zeros((4, 8, 8, 3), np.uint8))
    np.savez(box / "r.npz", np.zeros((4, 8, 8, 3), np.uint8))
    damaged(box / "s.npz", how)
    sees_one_line(capsys, ["evaluate", "--samples", "s.npz", "--reference", "r.npz", "--metrics", "is"], ["s.npz"], box)


def test_samples_under_another_name(box, capsys):
    np.savez(box / "s.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    sees_one_line(capsys, ["evaluate", "--samples", "s.npz", "--reference", "s.npz", "--metrics", "is"], ["s.npz", "arr_0"], box)


def test_samples_of_another_kind(box, capsys):
    np.savez(box / "s.npz", np.zeros((4, 8, 8, 3), np.float32))
    sees_one_line(capsys, ["evaluate", "--samples", "s.npz", "--reference", "s.npz", "--metrics", "is"], ["s.npz", "uint8"], box)


def hostile(path, marker):
    """Pickles that run code when they are loaded without care: as a zip of torch's, and bare."""
    torch.save({"model": Payload(marker)}, path)
    bare = path.with_name("bare_" + path.name)
    bare.write_bytes(pickle.dumps({"model": Payload(marker)}))
    return [path, bare]


def test_hostile_weights_are_refused_and_do_nothing(tiny, box, capsys, tmp_path):
    marker = tmp_path / "it ran"
    for path in hostile(box / "evil.pt", marker):
        sees_one_line(capsys, [*sampling(tiny), "--checkpoint", path], [path.name], box)
        sees_one_line(capsys, sampling(tiny, f"vae.ckpt_path={path}"), [path.name], box)
        sees_one_line(capsys, [*extraction(tiny, tiny.images), "--checkpoint", path], [path.name], box)
        sees_one_line(capsys, ["train", *tiny.dit(box / "runs"), f"train.weight_init={path}"], [path.name], box)
        sees_one_line(capsys, ["train-tokenizer", *tiny.tokenizer(box / "runs"), f"weight_init={path}"], [path.name], box)
        lpips = (f"perceptual.vgg_weights={path}", f"perceptual.linear_weights={path}", "perceptual.standin=null")
        sees_one_line(capsys, ["train-tokenizer", *tiny.tokenizer(box / "runs"), *lpips], [path.name], box)
        inception = ["--metrics", "is", "--image-size", "16", "--inception", path]
        sees_one_line(capsys, ["evaluate", "--samples", tiny.images, "--reference", tiny.images, *inception], [path.name], box)
    assert not marker.exists()


def test_hostile_statistics_and_samples_are_refused_and_do_nothing(tiny, box, capsys, tmp_path):
    marker = tmp_path / "it ran"
    copy(tiny.latents, box / "latents")
    for path in hostile(box / "evil.pt", marker):
        shutil.copy(path, box / "latents" / "latents_stats.pt")
        sees_one_line(capsys, ["train", *tiny.dit(box / "runs"), "data.data_path=latents"], ["latents_stats.pt"], box)
    np.savez(box / "evil.npz", arr_0=np.array([Payload(marker)], dtype=object))
    sees_one_line(capsys, ["evaluate", "--samples", "evil.npz", "--reference", "evil.npz", "--metrics", "is"], ["evil.npz"], box)
    assert not marker.exists()


def test_weights_with_nan_in_the_latents_are_found_where_they_are_read(tiny, box, capsys):
    """Not in the plan, which reads no payload: training stops at the batch, names the folder, and the run can go on later."""
    copy(tiny.latents, box / "latents")
    path = box / "latents" / "latents_rank00_shard000.safetensors"
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    tensors = load_file(path)
    data[8 + header : 8 + header + 4] = np.array([np.nan], np.float32).tobytes()
    data[8 + header + tensors["latents"].nbytes :][:4] = np.array([np.nan], np.float32).tobytes()
    path.write_bytes(data)
    assert main(["train", *map(str, tiny.dit(box / "runs")), "data.data_path=latents", "train.max_steps=8"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "latents" in said and "NaN" in said, said
    whole(box / "runs")


# -- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, said", [
    (["train.global_batch_size=4"], "train.global_batch_size 4 does not divide over 3 processes; nearest: 3, 6"),
    (["train.global_batch_size=12", "train.micro_batch_size=3"], "3 processes x train.micro_batch_size 3; nearest: 9, 18"),
])  # fmt: skip
def test_a_batch_that_does_not_divide(tiny, box, capsys, monkeypatch, words, said):
    monkeypatch.setenv("WORLD_SIZE", "3")
    sees_one_line(capsys, ["train", *tiny.dit(box / "runs"), *words], [said], box)
    sees_one_line(capsys, ["train-tokenizer", *tiny.tokenizer(box / "runs"), *words], [said], box)


def test_nothing_of_the_pipeline_was_touched(tiny):
    """All of the above read it; its images and shards are as they were made."""
    assert len(contents(tiny.images, "*.png")) == 16 and files(tiny.latents) == [
        "latents_rank00_shard000.safetensors", "latents_rank00_shard001.safetensors", "latents_rank00_shard002.safetensors",
        "latents_stats.pt", "manifest.json",
    ]  # fmt: skip
