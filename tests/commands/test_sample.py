"""sample, whole: an image is a function of (seed, i) alone, what is missing is drawn again to the same bytes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import contents, copy, done, files

from vavae_fast import artifacts, distributed
from vavae_fast.cli import main
from vavae_fast.commands import sample as module
from vavae_fast.errors import BadInput


def drawn(tiny, out, *more):
    done("sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out), *more)
    with np.load(out / "samples.npz", allow_pickle=False) as archive:
        return archive["arr_0"], archive["arr_1"]


@pytest.fixture(scope="module")
def ten(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("ten") / "out"
    drawn(tiny, out)
    return out


def images_of(out):
    with np.load(out / "samples.npz", allow_pickle=False) as archive:
        return archive["arr_0"], archive["arr_1"]


def test_what_is_written(tiny, ten):
    assert files(ten) == ["manifest.json", "samples.npz", "samples.png"]
    images, labels = images_of(ten)
    assert images.shape == (10, 16, 16, 3) and images.dtype == np.uint8 and labels.shape == (10,) and labels.dtype == np.int64
    assert set(labels.tolist()) <= {0, 1} and images.std() > 0
    manifest = json.loads((ten / "manifest.json").read_text())
    assert manifest["kind"] == "samples" and manifest["sha256"] == artifacts.sha256(ten / "samples.npz")
    assert manifest["facts"]["checkpoint"]["step"] == 4 and manifest["facts"]["num"] == 10
    grid = np.asarray(Image.open(ten / "samples.png"))
    assert grid.shape == (4 * 18 + 2, 3 * 18 + 2, 3) and np.array_equal(grid[2:18, 2:18], images[0]) and np.array_equal(grid[20:36, 38:54], images[5])


def test_a_second_call_finds_it_complete(tiny, ten, capsys):
    before = {path: path.stat().st_mtime_ns for path in ten.iterdir()}
    drawn(tiny, ten)
    assert "already complete" in capsys.readouterr().out and {p: p.stat().st_mtime_ns for p in ten.iterdir()} == before


def test_an_image_does_not_depend_on_its_batch_or_on_how_many_are_drawn(tiny, ten, out):
    """Up to the rounding of a batched product: at most one step of a uint8, and rarely."""
    images, labels = images_of(ten)
    for k, more in enumerate((["sample.per_proc_batch_size=1"], ["sample.per_proc_batch_size=10"], ["--num", "7", "sample.per_proc_batch_size=3"])):
        others, other_labels = drawn(tiny, out / str(k), *more)
        difference = np.abs(others.astype(int) - images[: len(others)].astype(int))
        assert np.array_equal(other_labels, labels[: len(others)])
        assert difference.max() <= 1 and difference.mean() < 1e-2, more


def test_latents_of_a_batch_split_agree_to_rounding(tiny):
    """The same before they become pixels: relative 1e-5."""
    from vavae_fast.commands import build
    from vavae_fast.config import load_config
    from vavae_fast.flow.generate import SamplerSettings, generate_latents

    config = load_config(tiny.root / "dit.yaml")
    model, _ = build.trained_lightningdit(config, str(tiny.dit_run))
    settings, labels = SamplerSettings(num_steps=8, cfg_scale=2.0), torch.arange(8) % 2

    def draw(batch_size):
        parts = generate_latents(model, labels, (4, 2, 2), settings, seed=0, null_label=2, batch_size=batch_size)
        return torch.cat([latents for _, latents in parts])

    whole = draw(8)
    for batch_size in (1, 3):
        assert (draw(batch_size) - whole).norm() <= 1e-5 * whole.norm()


def test_interrupted_and_continued_it_is_the_same_bytes(tiny, ten, out, monkeypatch):
    """Stopped before the pieces are put together, with one piece lost and one half-written."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "_assemble", lambda plan, world: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert main(["sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out)]) == 130
    assert files(out) == ["parts/00000000.npz", "parts/00000004.npz", "parts/00000008.npz", "parts/manifest.json"]
    (out / "parts" / "00000004.npz").unlink()
    (out / "parts" / "00000004.npz.tmp").write_bytes(b"half")
    kept = (out / "parts" / "00000000.npz").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(module, "_assemble", lambda plan, world: None)
        drawn_again = main(["sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out)])
    assert drawn_again == 0 and (out / "parts" / "00000000.npz").stat().st_mtime_ns == kept, "what is there is not drawn again"
    done("sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out))
    assert files(out) == ["manifest.json", "samples.npz", "samples.png"]
    for a, b in zip(images_of(out), images_of(ten)):
        assert np.array_equal(a, b)


def test_a_part_that_has_gone_is_named(tmp_path):
    """Its folder was removed before all could be put together."""
    config = SimpleNamespace(sample=SimpleNamespace(per_proc_batch_size=4), data=SimpleNamespace(image_size=8))
    plan = SimpleNamespace(out=tmp_path, num=4, config=config)
    with pytest.raises(BadInput) as caught:
        list(module._batches(plan))
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/parts/00000000.npz: ") and said.endswith("; the same command draws it again") and "remove" not in said


def test_a_damaged_part_is_named_and_drawn_again(tiny, ten, out, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(module, "_assemble", lambda plan, world: None)
        done("sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out))
    part = out / "parts" / "00000004.npz"
    data = bytearray(part.read_bytes())
    data[600] ^= 1
    part.write_bytes(data)
    capsys.readouterr()
    assert main(["sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "00000004.npz: cannot be read (BadZipFile)" in said and f"remove {part}: the same command draws it again" in said
    part.unlink()
    done("sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out))
    assert np.array_equal(images_of(out)[0], images_of(ten)[0])


def test_another_draw_into_the_same_folder_is_refused(tiny, ten, out, capsys):
    copy(ten, out)
    before = contents(out, "*.*")
    for more in (["--seed", "1"], ["sample.cfg_scale=2"], ["--num", "9"], ["--weights", "model"], ["sample.num_sampling_steps=5"]):
        capsys.readouterr()
        assert main(["sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out), *more]) == 2, more
        assert "holds samples of other settings; choose another --out" in capsys.readouterr().err
    assert contents(out, "*.*") == before


def test_a_draw_begun_with_another_batch_size_is_continued_with_that(tiny, out, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "_assemble", lambda plan, world: None)
        done("sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out))
    assert main(["sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out), "sample.per_proc_batch_size=5"]) == 2
    assert "per_proc_batch_size=4; continue with that" in capsys.readouterr().err


def test_a_draw_begun_in_another_precision_is_not_finished_in_this_one(tiny, out, capsys, monkeypatch):
    """`auto` is bf16 on a GPU and float32 on a CPU: a draw that moves from one to the other would be half of each."""
    words = ["sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_assemble", lambda plan, world: None)
        patch.setattr(module, "precision_of", lambda config, device: "bf16")
        done(*words)
    assert main(words) == 2
    assert "was begun with sample.precision=bf16; continue with that" in capsys.readouterr().err


def test_another_tokenizer_than_the_latents_is_refused(tiny, out, tmp_path, capsys):
    """By what the checkpoint knows of its latents; of a file of weights, by the latents whose statistics are used."""
    other = f"vae.ckpt_path={tiny.tokenizer_run / 'checkpoints' / 'step_00000002'}"
    assert main(["sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out), other]) == 2
    said = capsys.readouterr().err
    assert "step_00000002: not the tokenizer that made the latents of" in said and said.count("\n") == 1
    weights = tmp_path / "lightningdit.safetensors"
    done("export", "--run", str(tiny.dit_run), "--out", str(weights))
    assert main(["sample", *tiny.dit(), "--checkpoint", str(weights), "--out", str(out), other]) == 2
    assert f"made the latents of {tiny.latents}" in capsys.readouterr().err and not out.exists()


def test_everything_that_an_image_depends_on_is_in_the_manifest(tiny, ten):
    facts = json.loads((ten / "manifest.json").read_text())["facts"]
    assert facts["tokenizer"]["sha256"] == facts["checkpoint"]["tokenizer"] and facts["weights"] == "ema"
    assert facts["statistics_sha256"] == artifacts.sha256(tiny.latents / "latents_stats.pt")


def test_seed_weights_and_labels_matter(tiny, ten, out):
    images, labels = images_of(ten)
    assert not np.array_equal(drawn(tiny, out / "seed", "--seed", "1")[0], images)
    assert not np.array_equal(drawn(tiny, out / "weights", "--weights", "model")[0], images)
    assert drawn(tiny, out / "given", "--labels", "1,0,0", "--num", "5")[1].tolist() == [1, 0, 0, 1, 0]
    assert drawn(tiny, out / "balanced", "sample.labels=balanced")[1].tolist() == [0, 1] * 5


def test_single_images_are_those_of_the_archive(tiny, ten, out):
    images, _ = drawn(tiny, out, "--png")
    assert np.array_equal(images, images_of(ten)[0])
    names = sorted((out / "png").iterdir())
    assert len(names) == 10 and all(np.array_equal(np.asarray(Image.open(path)), image) for path, image in zip(names, images))


def test_single_images_can_be_asked_for_later(tiny, ten, out, monkeypatch):
    """Of parts that were drawn without them, and of a draw that is complete."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "_assemble", lambda plan, world: None)
        done("sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out))
    drawn(tiny, out, "--png")
    assert len(list((out / "png").iterdir())) == 10
    (out / "png" / "000003.png").unlink()
    images, _ = drawn(tiny, out, "--png")
    assert np.array_equal(np.asarray(Image.open(out / "png" / "000003.png")), images[3]) and np.array_equal(images, images_of(ten)[0])


def test_single_images_of_a_complete_draw_are_the_main_process_s(tiny, ten, out, monkeypatch):
    """Several would take each other's temporary files away."""
    copy(ten, out)
    monkeypatch.setattr(distributed, "open_world", lambda: distributed.World(rank=1, size=1, device=torch.device("cpu")))
    done("sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out), "--png")
    assert not (out / "png").exists()


def test_what_the_threads_of_single_images_meet_ends_the_draw(tiny, out, capsys):
    (out / "png" / "000002.png.tmp").mkdir(parents=True)
    assert main(["sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out), "--png"]) == 2
    assert "000002.png.tmp" in capsys.readouterr().err and not (out / "manifest.json").exists()


def test_what_the_writing_thread_meets_ends_the_draw(tiny, out, monkeypatch, capsys):
    def full(plan, first, images):
        raise OSError(28, "No space left on device", str(plan.out))

    monkeypatch.setattr(module, "_write_part", full)
    assert main(["sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out)]) != 0
    assert "No space left on device" in capsys.readouterr().err and not (out / "manifest.json").exists()


def test_autoguidance_by_a_lesser_model(tiny, ten, out, capsys):
    """A run folder brings its own config. The model as its own guide is no guidance at all, whatever the scale."""
    alone, _ = drawn(tiny, out / "alone", "sample.cfg_scale=1", "sample.cfg_channels=all")
    itself, _ = drawn(tiny, out / "itself", f"sample.guide={tiny.dit_run}", "sample.cfg_scale=3", "sample.cfg_channels=all")
    assert np.abs(itself.astype(int) - alone.astype(int)).max() <= 1
    manifest = json.loads((out / "itself" / "manifest.json").read_text())
    assert manifest["facts"]["guide"]["step"] == 4
    capsys.readouterr()
    assert main(["sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out / "x"), "sample.guide=nowhere"]) == 2
    assert "sample.guide" in capsys.readouterr().err
    assert main(["sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out / "x"), f"sample.guide={tiny.tokenizer_run}"]) == 2
    assert "sample.guide takes other latents or classes" in capsys.readouterr().err


def test_fp8_is_refused_before_anything_is_loaded_where_it_cannot_run(tiny, out, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine may have fp8")
    assert main(["sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out), "sample.precision=fp8"]) == 2
    assert "set sample.precision=bf16" in capsys.readouterr().err


def test_guidance_off_below_1_is_no_guidance(tiny, out):
    assert np.array_equal(drawn(tiny, out / "a", "sample.cfg_scale=1")[0], drawn(tiny, out / "b", "sample.cfg_scale=0")[0])


@pytest.mark.parametrize("more", [
    ("sample.sampling_method=heun",), ("sample.sampling_method=dopri5", "sample.timestep_shift=0"), ("sample.mode=SDE",),
    ("sample.cfg_channels=all", "sample.cfg_interval_start=0.2", "sample.cfg_interval_end=0.8"), ("sample.precision=bf16",),
    ("sample.precision=tf32",), ("--fused",),
])  # fmt: skip
def test_every_kind_of_sampling_runs(tiny, out, more):
    images, _ = drawn(tiny, out, "--num", "4", *more)
    assert images.shape == (4, 16, 16, 3) and images.std() > 0


def test_presets_and_defaults_name_the_folder(tiny, tmp_path):
    run = copy(tiny.dit_run, tmp_path / "runs" / "dit")
    done("sample", *tiny.dit(tmp_path / "runs"), "--checkpoint", str(run), "--num", "2", "--preset", "paper-64ep", "--seed", "7")
    manifest = json.loads((run / "samples-cfg10-seed7" / "manifest.json").read_text())
    facts = manifest["facts"]
    assert (facts["sampler"]["num_steps"], facts["sampler"]["cfg_interval_start"], facts["preset"]) == (250, 0.1, "paper-64ep")


def test_without_normalisation_no_statistics_are_needed(tiny, out):
    images, _ = drawn(tiny, out, "data.latent_norm=false", "data.data_path=null", "--num", "2")
    assert images.shape == (2, 16, 16, 3)


def test_dry_run_says_what_would_be_done_and_writes_nothing(tiny, out, capsys):
    done("sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out), "--dry-run")
    said = capsys.readouterr().out
    assert "\nlatent_multiplier 1.0\n" in said and "nothing was written" in said and not out.exists()
