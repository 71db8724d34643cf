"""Weights from files: every way in which a file can be wrong ends in one line, and no model is left half loaded or random."""

import argparse
import os
import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from vavae_fast.errors import BadInput
from vavae_fast.models.autoencoder import AutoencoderKL
from vavae_fast.models.weights import autoencoder_architecture, autoencoder_of, load_autoencoder, load_strict, read_state_dict

TINY = dict(embed_dim=4, ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(64,))


class Hostile:
    """Unpickled without restriction, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def vae():
    return AutoencoderKL(**TINY)


def same(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.ckpt", "w.bin"])
def test_plain_files(tmp_path, name):
    state = {"a": torch.randn(2, 3), "b": torch.arange(3)}
    save_file(state, tmp_path / name) if name.endswith(".safetensors") else torch.save(state, tmp_path / name)
    assert same(read_state_dict(tmp_path / name), state)
    assert same(read_state_dict(str(tmp_path / name)), state)


def test_the_old_format_of_torch(tmp_path):
    state = {"a": torch.randn(2, 3)}
    torch.save({"state_dict": state}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert same(read_state_dict(tmp_path / "w.pt"), state)


def test_containers_are_opened_the_preferred_one_first(tmp_path):
    checkpoint = {key: {"w": torch.full((1,), float(n))} for n, key in enumerate(("ema", "model", "state_dict"))}
    torch.save({**checkpoint, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4), "epoch": 3}, tmp_path / "w.pt")
    for n, prefer in enumerate(("ema", "model", "state_dict")):
        assert read_state_dict(tmp_path / "w.pt", prefer=prefer)["w"].item() == n
    torch.save({"ema": checkpoint["ema"], "step": 1}, tmp_path / "e.pt")
    assert read_state_dict(tmp_path / "e.pt", prefer="model")["w"].item() == 0


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_dropped_and_logged(tmp_path, prefix, caplog):
    torch.save({"model": {prefix + "blocks.0.w": torch.ones(1), prefix + "b": torch.zeros(1)}}, tmp_path / "w.pt")
    with caplog.at_level("INFO"):
        assert list(read_state_dict(tmp_path / "w.pt")) == ["blocks.0.w", "b"]
    assert "dropped the prefixes of DDP or torch.compile from 2 keys" in caplog.text


def test_prefixes_that_collide_are_refused(tmp_path):
    torch.save({"module.a": torch.ones(1), "a": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match="two entries for a"):
        read_state_dict(tmp_path / "w.pt")


def written(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("w.pt", b"", "the file is empty"),
        ("w.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a Git LFS pointer"),
        ("w.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("w.pt", b"\n<!DOCTYPE html><html>", "a web page"),
        ("w.pt", b"not a checkpoint at all", "not a PyTorch file, or damaged"),
        ("w.safetensors", b"not a checkpoint at all", "not a safetensors file, or damaged"),
        ("w.pt", pickle.dumps({"a": 1}), "not a PyTorch file, or damaged"),
        ("w.pt", [torch.ones(1)], "holds a list, expected a state dict"),
        ("w.pt", torch.ones(1), "holds a Tensor, expected a state dict"),
        ("w.pt", {}, "no state dict inside"),
        ("w.pt", {"epoch": 3, "loss": 0.5}, "no state dict inside .found: epoch, loss."),
        ("w.pt", {"a": torch.ones(1), "epoch": 3}, "expected only tensors by name, found epoch"),
        ("w.pt", {"model": {"a": torch.ones(1), "n": 3}}, "under 'model', found n"),
        ("w.pt", {"model": {}}, "under 'model', found nothing"),
    ],
)
def test_wrong_files_are_named(tmp_path, name, content, reason):
    path = written(tmp_path / name, content)
    with pytest.raises(BadInput, match=reason) as error:
        read_state_dict(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        read_state_dict(tmp_path / "w.pt")
    with pytest.raises(BadInput, match="a folder; expected a file"):
        read_state_dict(tmp_path)


def test_zips_that_torch_did_not_write(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(BadInput, match="a zip archive, not a PyTorch file"):
        read_state_dict(tmp_path / "photos.pt")
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as stored, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in stored.namelist():
            packed.writestr(member, stored.read(member))
    with pytest.raises(BadInput, match="a compressed zip"):
        read_state_dict(tmp_path / "bomb.pt")


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("beside_weights", [True, False])
def test_code_in_a_checkpoint_never_runs(tmp_path, new_format, beside_weights):
    trap = Hostile(tmp_path / "ran")
    content = {"state_dict": {"a": torch.ones(1)}, "callbacks": trap} if beside_weights else trap
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(BadInput, match=r"refused, it holds Python objects that could run code \((posix|nt|os)\.mkdir\)"):
        read_state_dict(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_plain_pickle_never_runs(tmp_path, protocol):
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"a": Hostile(tmp_path / "ran")}, protocol))
    with pytest.raises(BadInput):
        read_state_dict(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_a_whole_module_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(BadInput, match="torch.nn.modules.linear.Linear"):
        read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["new.pt", "old.pt", "w.safetensors"])
def test_damage_is_bad_input_and_nothing_else(tmp_path, name):
    """Cut anywhere or with a few bytes changed: read as tensors, or refused in one line; never another exception."""
    state = {"module.a": torch.randn(5), "b": torch.randn(2, 2)}
    if name.endswith("safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save({"state_dict": state, "n": 3}, tmp_path / name, _use_new_zipfile_serialization=name == "new.pt")
    whole, draw, refused = (tmp_path / name).read_bytes(), random.Random(0), 0
    path = tmp_path / f"damaged.{name.split('.')[1]}"
    for trial in range(150):
        damaged = bytearray(whole)
        if trial % 2:
            del damaged[draw.randrange(len(damaged)) :]
        for _ in range(draw.randint(1, 6) if damaged else 0):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_state_dict(path)
        except BadInput as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 75


def test_load_strict_copies_everything(vae):
    other = AutoencoderKL(**TINY)
    load_strict(other, vae.state_dict(), "memory")
    assert same(other.state_dict(), vae.state_dict())


def test_load_strict_casts_and_keeps_the_module_s_tensors(vae):
    half = {key: value.half() for key, value in vae.state_dict().items()}
    before = vae.encoder.conv_in.weight
    load_strict(vae, half, "memory")
    assert vae.encoder.conv_in.weight is before and before.dtype == torch.float32
    assert torch.equal(before, half["encoder.conv_in.weight"].float())


def broken(state, fault):
    state = dict(state)
    if fault == "missing":
        del state["quant_conv.bias"]
    elif fault == "unexpected":
        state["quant_conv.extra"] = torch.zeros(1)
    elif fault == "shape":
        state["quant_conv.bias"] = torch.zeros(3)
    elif fault == "kind":
        state["quant_conv.bias"] = torch.zeros(8, dtype=torch.int64)
    return state


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("missing", "1 missing: quant_conv.bias"),
        ("unexpected", "1 unexpected: quant_conv.extra"),
        ("shape", r"1 of another shape: quant_conv.bias is \(3,\), expected \(8,\)"),
        ("kind", r"1 of another kind: quant_conv.bias is torch.int64, expected torch.float32"),
    ],
)
def test_one_fault_and_nothing_is_loaded(vae, fault, reason):
    state = broken({key: torch.full_like(value, 7.0) for key, value in vae.state_dict().items()}, fault)
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    with pytest.raises(BadInput, match=f"^some.pt: does not fit AutoencoderKL: {reason}; nothing was loaded$"):
        load_strict(vae, state, "some.pt")
    assert same(vae.state_dict(), before)


def test_many_faults_are_counted_and_five_are_named(vae):
    with pytest.raises(BadInput) as error:
        load_strict(vae, {}, "some.pt")
    count = len(vae.state_dict())
    assert f"{count} missing: encoder.conv_in.weight" in str(error.value) and f"and {count - 5} more" in str(error.value)


def test_the_likely_cause_is_named(vae):
    wider = AutoencoderKL(**{**TINY, "embed_dim": 6})
    with pytest.raises(BadInput, match="6 latent channels in the file, 4 in the config, set .*embed_dim"):
        load_strict(vae, wider.state_dict(), "some.pt")
    with pytest.raises(BadInput, match="its keys start with 'vae.'"):
        load_strict(vae, {"vae." + key: value for key, value in vae.state_dict().items()}, "some.pt")
    with pytest.raises(BadInput, match="it belongs to another kind of model"):
        load_strict(vae, torch.nn.Linear(2, 2).state_dict(), "some.pt")


def test_ignored_prefixes_may_be_absent_or_there(vae):
    state = {key: value for key, value in vae.state_dict().items() if not key.startswith("decoder.")}
    load_strict(vae, {**state, "loss.logvar": torch.zeros(())}, "some.pt", ignore=("decoder.", "loss."))


@pytest.mark.parametrize(
    "change",
    [{}, {"embed_dim": 6}, {"z_channels": 6}, {"ch": 16}, {"ch_mult": (1, 2, 3)}, {"ch_mult": (1, 1, 2, 2)}, {"num_res_blocks": 2},
     {"attn_resolutions": ()}, {"attn_resolutions": (128, 64)}, {"in_channels": 1, "out_ch": 1}],
)  # fmt: skip
def test_architecture_is_read_off_the_shapes(change):
    made = {**TINY, **change}
    vae = AutoencoderKL(**made)
    found = autoencoder_architecture(vae.state_dict())
    again = AutoencoderKL(**found)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in vae.state_dict().items()}
    assert {key: value for key, value in found.items() if key in made} == {**made, "attn_resolutions": found["attn_resolutions"]}
    assert set(found["attn_resolutions"]) == set(made["attn_resolutions"])


def released(vae):
    """Keys of a VA-VAE training checkpoint: the autoencoder beside what it was trained with."""
    return {
        **vae.state_dict(),
        "loss.logvar": torch.zeros(()),
        "loss.discriminator.main.0.weight": torch.zeros(2, 3, 4, 4),
        "foundation_model.model.cls_token": torch.zeros(1),
        "linear_proj.weight": torch.zeros(6, 4, 1, 1),
    }


@pytest.mark.parametrize("fused", [False, True])
def test_a_released_checkpoint_loads_with_its_architecture_unknown(tmp_path, vae, fused, caplog):
    torch.save({"state_dict": released(vae), "global_step": 5}, tmp_path / "vavae.pt")
    with caplog.at_level("INFO"):
        found = load_autoencoder(tmp_path / "vavae.pt", fused=fused)
    assert same(found.state_dict(), vae.state_dict()) and not found.training
    assert "4 others are left out" in caplog.text
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(found(x, sample_posterior=False)[0], vae.eval()(x, sample_posterior=False)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["vae.", "model.first_stage."])
def test_a_common_prefix_is_accepted(tmp_path, vae, prefix):
    save_file({**{prefix + key: value for key, value in vae.state_dict().items()}, "ema_decay": torch.zeros(1)}, tmp_path / "w.safetensors")
    assert same(load_autoencoder(tmp_path / "w.safetensors").state_dict(), vae.state_dict())


def test_a_config_that_agrees_is_taken(tmp_path, vae):
    save_file(vae.state_dict(), tmp_path / "w.safetensors")
    config = dict(TINY, ch_mult=[1, 2, 2], resolution=64, attn_resolutions=[16], dropout=0.1, num_groups=4)
    found = load_autoencoder(tmp_path / "w.safetensors", config)
    assert found.encoder.norm_out.num_groups == 4 and found.encoder.mid.block_1.dropout.p == 0.1


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"embed_dim": 32}, "embed_dim is 4 in the file, 32 in the config; set embed_dim to 4"),
        ({"ch": 128}, "ch is 8 in the file, 128 in the config"),
        ({"ch_mult": [1, 1, 2, 2, 4]}, r"ch_mult is \(1, 2, 2\) in the file, \(1, 1, 2, 2, 4\) in the config"),
        ({"num_res_blocks": 2}, "num_res_blocks is 1 in the file, 2 in the config"),
        ({"attn_resolutions": (128,)}, r"levels \[2\] attend in the file, \[1\] in the config"),
    ],
)
def test_a_config_that_contradicts_the_file_is_refused(tmp_path, vae, config, reason):
    save_file(vae.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(BadInput, match=reason):
        load_autoencoder(tmp_path / "w.safetensors", config)


def test_a_file_of_something_else_never_gives_a_random_autoencoder(tmp_path, vae):
    """The reference loads with strict=False and drops the report: a wrong file decodes to noise."""
    wrong = {
        "dit": torch.nn.Linear(3, 3).state_dict(),
        "half": {key: value for key, value in vae.state_dict().items() if key.startswith("encoder.")},
        "no_norm": {key: value for key, value in vae.state_dict().items() if "norm_out" not in key},
        "extra": {**vae.state_dict(), "decoder.up.9.block.0.conv1.weight": torch.zeros(1)},
        "diffusers": {"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3), "encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)},
        "two": {**vae.state_dict(), **{f"ema.{key}": value for key, value in vae.state_dict().items()}},
    }
    for name, state in wrong.items():
        torch.save(state, tmp_path / f"{name}.pt")
        with pytest.raises(BadInput, match=f"{name}.pt: "):
            load_autoencoder(tmp_path / f"{name}.pt")


@pytest.mark.parametrize("change", [
    lambda state: state | {"encoder.conv_in.weight": torch.empty(10**9, 0, 3, 3, device="meta")},
    lambda state: state | {f"encoder.down.0.block.{10**9}.conv2.weight": torch.ones(8, 8, 3, 3)},
    lambda state: state | {"decoder.conv_in.weight": torch.empty(10**9, 0, 3, 3, device="meta")},
])  # fmt: skip
def test_shapes_of_terabytes_are_refused_before_anything_is_allocated(vae, change):
    with pytest.raises(BadInput, match="x.pt: "):
        autoencoder_of(change(vae.state_dict()), "x.pt")


@pytest.mark.parametrize("claim", [{"ch": 1 << 20}, {"num_res_blocks": 1 << 30}, {"nothing": 1}, {"embed_dim": "x"}, {"dropout": "x"}])
def test_a_claimed_architecture_is_held_against_the_weights(vae, claim):
    with pytest.raises(BadInput, match="x.pt: "):
        autoencoder_of(vae.state_dict(), "x.pt", claim)
