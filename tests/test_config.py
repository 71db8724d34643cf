"""Configs: every YAML here and the reference's key structure load, round-trip, and refuse what cannot run."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_keys import LIGHTNINGDIT, TOKENIZER

from vavae_fast.config import LightningDiTConfig, TokenizerConfig, accumulation, flatten, given_path, load_config, run_folder, to_mapping, to_yaml
from vavae_fast.errors import BadInput
from vavae_fast.schema import SAMPLE_PRESETS

ROOT = Path(__file__).parents[1]
OURS = sorted((ROOT / "configs").glob("*.yaml"))
REFERENCE = os.environ.get("VAVAE_REFERENCE")

def written(tmp_path, text, name="run.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


# -- every config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_our_configs_load_and_round_trip(path, tmp_path):
    config = load_config(path)
    assert load_config(written(tmp_path, to_yaml(config))) == config


def _reference_configs():
    root = Path(REFERENCE) if REFERENCE else None
    return sorted([*root.glob("configs/**/*.yaml"), *root.glob("vavae/configs/*.yaml")]) if root else []


@pytest.mark.skipif(not _reference_configs(), reason="set VAVAE_REFERENCE to a checkout of the reference repository")
def test_every_config_of_the_reference_loads_and_round_trips(tmp_path):
    for path in _reference_configs():
        config = load_config(path)
        assert load_config(written(tmp_path, to_yaml(config))) == config, path


def test_the_references_lightningdit_keys(tmp_path):
    config = load_config(written(tmp_path, LIGHTNINGDIT))
    assert isinstance(config, LightningDiTConfig)
    assert (config.latent_size, config.model.in_chans, config.train.max_steps, config.optimizer.lr) == (16, 32, 80000, 2e-4)
    assert (config.sample.cfg_scale, config.sample.cfg_channels, config.transport.loss_weight) == (10.0, 3, None)
    assert config.optimizer.max_grad_norm is None and not config.train.fused and config.train.ema_decay == 0.9999
    assert load_config(written(tmp_path, to_yaml(config))) == config


def test_the_references_tokenizer_keys_with_the_templates_empty_values(tmp_path):
    config = load_config(written(tmp_path, TOKENIZER))
    assert isinstance(config, TokenizerConfig)
    loss = config.model.params.lossconfig.params
    assert (loss.disc_start, loss.vf_weight, loss.distmat_margin, loss.cos_margin) == (5001, 0.5, 0.0, 0.0)
    assert config.global_batch_size == 8 * 8 * 4 and config.image_size == 256 and config.downsample_ratio == 16
    assert config.image_path == "/data/imagenet" and config.start_weights is None
    assert load_config(written(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize("key", ["weight_init", "init_weight", "model.params.ckpt_path"])
def test_each_name_for_the_starting_weights_counts(tmp_path, key):
    """The reference reads `init_weight` where its YAML documents `weight_init`, and then trains from scratch in silence."""
    path = written(tmp_path, TOKENIZER)
    assert load_config(path, (f"{key}=a.pt",)).start_weights == "a.pt"
    with pytest.raises(BadInput, match="name different files"):
        load_config(path, (f"{key}=a.pt", "weight_init=b.pt" if key != "weight_init" else "init_weight=b.pt"))


@pytest.mark.parametrize("preset", SAMPLE_PRESETS)
def test_presets_are_sample_keys(tmp_path, preset):
    overrides = tuple(f"sample.{key}={value}" for key, value in SAMPLE_PRESETS[preset].items())
    sample = load_config(written(tmp_path, LIGHTNINGDIT), overrides).sample
    assert all(getattr(sample, key) == value for key, value in SAMPLE_PRESETS[preset].items())


# -- what cannot run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.use_qnorm=true", ["unknown key model.use_qnorm", "model.use_qknorm?"]),
        ("modle.in_chans=4", ["unknown key modle", "Did you mean model?"]),
        ("model.model_type=LightningDiT-XXL/1", ["model.model_type", "LightningDiT-XL/1"]),
        ("model.hidden_size=64", ["model.hidden_size", "model_type: custom"]),
        ("data.image_size=250", ["data.image_size 250", "= 16"]),
        ("train.max_steps=0", ["train.max_steps: must be above 0, got 0"]),
        ("train.max_steps=1.5", ["train.max_steps: expected a whole number, got 1.5"]),
        ("train.keep_last=1", ["train.keep_last: must be 2 or more"]),
        ("train.keep_every=0", ["train.keep_every: must be above 0"]),
        ("train.ckpt=a.pt", ["train.ckpt", "train.weight_init"]),
        ("log.valid_every=0", ["log.valid_every: must be above 0"]),
        ("train.ema_decay=1.0", ["train.ema_decay"]),
        ("train.global_seed=-1", ["train.global_seed"]),
        ("train.precision=fp16", ["train.precision: expected one of auto, bf16, fp32"]),
        ("optimizer.lr='2e-4'", ["optimizer.lr", "remove the quotes"]),
        ("optimizer.lr=.nan", ["optimizer.lr: expected a number"]),
        ("optimizer.lr=0", ["optimizer.lr: must be above 0"]),
        ("optimizer.max_grad_norm=0", ["optimizer.max_grad_norm"]),
        ("transport.path_type=linear", ["transport.path_type: expected one of Linear, GVP, VP"]),
        ("transport.partitial_train=[0.5, 0.2]", ["transport.partitial_train"]),
        ("sample.num_sampling_steps=1", ["sample.num_sampling_steps: must be 2 or more"]),
        ("sample.cfg_interval_start=1.5", ["sample.cfg_interval"]),
        ("sample.cfg_channels=0", ["sample.cfg_channels"]),
        ("sample.reverse=true", ["sample.reverse"]),
        ("sample.fid_num=0", ["sample.fid_num"]),
        ("log.to=[mlflow]", ["log.to[0]: expected one of tensorboard, wandb"]),
    ],
)
def test_a_lightningdit_config_that_cannot_run(tmp_path, override, words):
    with pytest.raises(BadInput) as caught:
        load_config(written(tmp_path, LIGHTNINGDIT), (override,))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.num_heads=3"], ["model.hidden_size: must be a multiple of num_heads 3, got 64"]),
        (["model.num_heads=32"], ["model.hidden_size / num_heads", "multiple of 4"]),
        (["model.depth=null"], ["model.depth", "model_type: custom"]),
    ],
)
def test_a_custom_model_needs_numbers_that_fit(tmp_path, overrides, words):
    custom = ["model.model_type=custom", "model.hidden_size=64", "model.depth=1", "model.num_heads=4", "model.patch_size=1"]
    path = written(tmp_path, LIGHTNINGDIT)
    assert load_config(path, tuple(custom)).model.patch == 1
    with pytest.raises(BadInput) as caught:
        load_config(path, (*custom, *overrides))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.params.embed_dimm=4", ["unknown key model.params.embed_dimm", "model.params.embed_dim?"]),
        ("model.params.ddconfig.ch_mult=[]", ["model.params.ddconfig.ch_mult"]),
        ("model.params.ddconfig.in_channels=1", ["model.params.ddconfig.in_channels", "must be 3", "got 1"]),
        ("model.params.ddconfig.out_ch=4", ["model.params.ddconfig.out_ch", "must be 3", "got 4"]),
        ("model.params.ddconfig.double_z=false", ["model.params.ddconfig.double_z"]),
        ("model.params.lossconfig.params.disc_loss=wgan", ["disc_loss: expected one of hinge, vanilla"]),
        ("model.params.lossconfig.params.kl_weight=-1", ["model.params.lossconfig.params.kl_weight"]),
        ("model.params.ignore_keys=[loss]", ["model.params.ignore_keys"]),
        ("data.image_size=100", ["data.image_size 100", "16"]),
        ("data.params.batch_size=0", ["data.params.batch_size"]),
        ("lightning.trainer.devices=0", ["lightning.trainer.devices"]),
        ("decay_fraction=2", ["decay_fraction"]),
        ("max_grad_norm=0", ["max_grad_norm: must be above 0, or null, got 0"]),
    ],
)
def test_a_tokenizer_config_that_cannot_run(tmp_path, override, words):
    with pytest.raises(BadInput) as caught:
        load_config(written(tmp_path, TOKENIZER), (override,))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


def test_a_command_gets_the_kind_it_needs(tmp_path):
    dit, tokenizer = written(tmp_path, LIGHTNINGDIT, "a.yaml"), written(tmp_path, TOKENIZER, "b.yaml")
    with pytest.raises(BadInput, match="b.yaml: this command needs a LightningDiT config"):
        load_config(tokenizer, kind=LightningDiTConfig)
    with pytest.raises(BadInput, match="a.yaml: this command needs a tokenizer config"):
        load_config(dit, kind=TokenizerConfig)


# -- paths ------------------------------------------------------------------------------------------------------------


def test_run_folder_is_one_name_under_output_dir(tmp_path):
    path = written(tmp_path, LIGHTNINGDIT)
    assert run_folder(load_config(path), path) == Path("output/xl")
    assert run_folder(load_config(path, ("train.exp_name=null",)), path) == Path("output/run")
    for name in ("a/b", "..", "."):
        with pytest.raises(BadInput, match="train.exp_name: must be one folder name"):
            run_folder(load_config(path, (f"train.exp_name={name}",)), path)


@pytest.mark.parametrize(
    "value, words", [(None, "not set"), ("", "not set"), ("path/to/your/latents", 'is still "path/to'), ("/nowhere/at/all", "does not exist")]
)
def test_a_path_that_is_not_there_says_which_key_to_set(value, words):
    with pytest.raises(BadInput, match=words) as caught:
        given_path(value, "data.data_path", "the folder of latents")
    assert "data.data_path=PATH" in str(caught.value) and "the folder of latents" in str(caught.value)


# -- the batch law ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 4096), st.none() | st.integers(1, 512), st.integers(1, 64))
def test_the_product_of_the_batch_is_exact_or_refused(global_batch, micro_batch, processes):
    try:
        micro, accumulated = accumulation(global_batch, micro_batch, processes)
    except BadInput as error:
        batches, _, sizes = str(error).rsplit("nearest: ", 1)[1].partition("; or train.micro_batch_size ")
        nearest = [int(word) for word in batches.split(", ")]
        smaller_and_larger = [int(word) for word in sizes.split(" or ") if word]
        assert all(_divides(global_batch, size, processes) for size in smaller_and_larger)
        assert len(smaller_and_larger) == (2 if micro_batch and global_batch % processes == 0 else 0)
        for batch in nearest:
            m, a = accumulation(batch, micro_batch, processes)
            assert m * a * processes == batch
        above = [b for b in nearest if b > global_batch]
        assert len(above) == 1 and not any(_divides(b, micro_batch, processes) for b in range(global_batch, above[0]))
    else:
        assert micro * accumulated * processes == global_batch
        assert micro <= (micro_batch or micro)


def _divides(global_batch, micro_batch, processes):
    try:
        accumulation(global_batch, micro_batch, processes)
    except BadInput:
        return False
    return True


def test_mapping_keys_are_what_overrides_take(tmp_path):
    path = written(tmp_path, LIGHTNINGDIT)
    config = load_config(path)
    for key, value in flatten(to_mapping(config)).items():
        if isinstance(value, (int, float, bool)) and not isinstance(value, str):
            assert load_config(path, (f"{key}={str(value).lower() if isinstance(value, bool) else value}",)) == config, key
