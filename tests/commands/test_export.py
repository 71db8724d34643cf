"""export: one file, in our format or the reference's layout, that gives back the same weights."""

import pytest
import torch
from safetensors import safe_open
from tiny import copy, done, files

from vavae_fast.cli import main
from vavae_fast.commands import build
from vavae_fast.config import load_config
from vavae_fast.models.weights import load_autoencoder
from vavae_fast.training.checkpoint import load_checkpoint


def saved(run, step, group):
    return load_checkpoint(run / "checkpoints" / f"step_{step:08d}", group)[0][group]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("which, step", [("ema", 4), ("model", 2)])
def test_an_exported_lightningdit_loads_as_the_checkpoint_does(tiny, out, suffix, which, step):
    path = out / f"dit{suffix}"
    done("export", "--run", str(tiny.dit_run), "--weights", which, "--step", str(step), "--out", str(path))
    state, identity = build.dit_weights(path, which)
    expected = saved(tiny.dit_run, step, which)
    assert state.keys() == expected.keys() and all(torch.equal(state[k], v) for k, v in expected.items()) and identity["path"] == str(path)
    model, _ = build.trained_lightningdit(load_config(tiny.root / "dit.yaml"), str(path), which)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert files(out) == [path.name] and path.stat().st_mode & 0o044 == 0o044


def test_the_default_is_the_newest_ema_in_the_references_layout(tiny, out):
    done("export", "--run", str(tiny.dit_run), "--out", str(out / "a.pt"))
    content = torch.load(out / "a.pt", weights_only=True)
    assert content.keys() == {"ema", "step"} and content["step"] == 4
    assert all(torch.equal(content["ema"][k], v) for k, v in saved(tiny.dit_run, 4, "ema").items())


def test_an_exported_tokenizer_loads_without_its_config(tiny, out):
    for name in ("vae.pt", "vae.safetensors"):
        done("export", "--run", str(tiny.tokenizer_run), "--out", str(out / name))
        model = load_autoencoder(out / name)
        expected = saved(tiny.tokenizer_run, 4, "model")
        assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    assert torch.load(out / "vae.pt", weights_only=True).keys() == {"state_dict", "step"}
    with safe_open(out / "vae.safetensors", "pt") as file:
        assert file.metadata()["stage"] == "tokenizer"


def test_a_damaged_newest_checkpoint_is_stepped_over(tiny, tmp_path, capsys):
    run = copy(tiny.dit_run, tmp_path / "dit")
    (run / "checkpoints" / "step_00000004" / "ema.safetensors").write_bytes(b"")
    done("export", "--run", str(run), "--out", str(tmp_path / "a.safetensors"))
    assert "trying an older checkpoint" in capsys.readouterr().out
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["step"] == "2"
    assert main(["export", "--run", str(run), "--step", "4", "--out", str(tmp_path / "b.pt")]) == 2
    assert "ema.safetensors" in capsys.readouterr().err and not (tmp_path / "b.pt").exists()


@pytest.mark.parametrize("more, words", [
    (["--step", "3"], "no checkpoint of step 3; there are: 2, 4"), (["--run", "nowhere"], "nowhere: no such run folder"),
    (["--out", "a.bin"], "--out: must be a .safetensors or .pt file"), (["--weights", "best"], "--weights"),
])  # fmt: skip
def test_what_cannot_be_exported(tiny, out, capsys, more, words):
    assert main(["export", "--run", str(tiny.dit_run), "--out", str(out / "a.pt"), *more]) == 2
    assert words in capsys.readouterr().err and not out.exists()


def test_a_tokenizer_has_no_ema(tiny, out, capsys):
    assert main(["export", "--run", str(tiny.tokenizer_run), "--weights", "ema", "--out", str(out / "a.pt")]) == 2
    assert "has no ema weights; it holds" in capsys.readouterr().err and not out.exists()


def test_dry_run_writes_nothing(tiny, out, capsys):
    done("export", "--run", str(tiny.dit_run), "--out", str(out / "a.pt"), "--dry-run")
    assert "ema weights of" in capsys.readouterr().out and not out.exists()
