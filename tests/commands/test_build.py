"""Configs into objects: the tokenizer and the model that a file or folder holds, and what tells them apart."""

import pytest
import torch
from tiny import copy, done

from vavae_fast.commands import build
from vavae_fast.config import load_config
from vavae_fast.errors import BadInput


def dit_config(tiny, *more):
    return load_config(tiny.root / "dit.yaml", more)


def tokenizer_config(tiny, *more):
    return load_config(tiny.root / "tokenizer.yaml", more)


def test_the_model_is_the_configs(tiny):
    model = build.lightningdit(dit_config(tiny, "model.depth=3", "model.use_qknorm=true", "data.num_classes=7"))
    assert len(model.blocks) == 3 and model.num_classes == 7 and model.in_channels == 4 and model.input_size == 2
    assert model.y_embedder.embedding_table.num_embeddings == 8


def test_the_spread_of_the_labels_is_the_configs(tiny):
    torch.manual_seed(0)
    table = build.lightningdit(dit_config(tiny, "data.num_classes=500", "model.label_init_std=0.5")).y_embedder.embedding_table.weight
    assert table.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("precision, device, expected", [
    ("auto", "cpu", False), ("auto", "cuda", True), ("bf16", "cpu", True), ("fp32", "cuda", False),
])  # fmt: skip
def test_precision(precision, device, expected):
    assert build.bf16(precision, torch.device(device)) is expected


def test_a_tokenizer_from_a_run_a_checkpoint_or_a_file_is_the_same(tiny, tmp_path):
    done("export", "--run", str(tiny.tokenizer_run), "--out", str(tmp_path / "vae.pt"))
    places = [tiny.tokenizer_run, tiny.tokenizer_run / "checkpoints" / "step_00000004", tmp_path / "vae.pt"]
    found = [build.tokenizer(config, str(place)) for place in places for config in (dit_config(tiny), tokenizer_config(tiny))]
    assert len({build.weights_digest(model) for model in found}) == 1
    assert not any(model.training or any(p.requires_grad for p in model.parameters()) for model in found)
    older = build.tokenizer(dit_config(tiny), str(tiny.tokenizer_run / "checkpoints" / "step_00000002"))
    assert build.weights_digest(older) != build.weights_digest(found[0])


def test_the_newest_whole_checkpoint_of_a_run_is_taken(tiny, tmp_path, capsys):
    run = copy(tiny.dit_run, tmp_path / "dit")
    assert build.checkpoint_folder(run).name == "step_00000004"
    (run / "checkpoints" / "step_00000004" / "manifest.json").unlink()
    assert build.checkpoint_folder(run).name == "step_00000002"
    (run / "checkpoints" / "step_00000002" / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="holds no complete checkpoint"):
        build.checkpoint_folder(run)
    with pytest.raises(BadInput, match="holds no complete checkpoint"):
        build.checkpoint_folder(tmp_path)


def test_weights_say_where_they_are_from(tiny):
    _, identity = build.dit_weights(tiny.dit_run, "ema")
    _, other = build.dit_weights(tiny.dit_run, "model")
    assert identity["step"] == 4 and identity["path"].endswith("step_00000004") and identity["sha256"] != other["sha256"]


@pytest.mark.parametrize("more, words", [
    (("model.in_chans=8",), "has 4 latent channels, model.in_chans is 8; set model.in_chans=4"),
    (("vae.downsample_ratio=4",), "downsamples by 8, vae.downsample_ratio is 4; set vae.downsample_ratio=8"),
])  # fmt: skip
def test_a_tokenizer_that_does_not_fit_the_model(tiny, more, words):
    with pytest.raises(BadInput, match=words):
        build.tokenizer(dit_config(tiny, *more), str(tiny.tokenizer_run))


def test_one_models_run_is_not_anothers(tiny):
    with pytest.raises(BadInput, match="a checkpoint of LightningDiT, not of a tokenizer"):
        build.tokenizer(dit_config(tiny), str(tiny.dit_run))
    with pytest.raises(BadInput, match="has no ema weights; it holds"):
        build.trained_lightningdit(dit_config(tiny), str(tiny.tokenizer_run))
    with pytest.raises(BadInput, match="another kind of model"):
        build.trained_lightningdit(dit_config(tiny), str(tiny.tokenizer_run), "model")


def test_a_digest_is_of_names_and_values(tiny):
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert build.weights_digest(a) == build.weights_digest(b)
    with torch.no_grad():
        b.weight[0, 0] += 1e-6
    assert build.weights_digest(a) != build.weights_digest(b)


def test_projections_have_the_references_shapes(tiny):
    features = build.foundation(tokenizer_config(tiny, f"foundation.standin={tiny.root / 'encoder.safetensors'}"))
    to_features = build.projection(tokenizer_config(tiny), features)
    to_z = build.projection(tokenizer_config(tiny, "model.params.reverse_proj=false"), features)
    assert to_features.weight.shape == (8, 4, 1, 1) and to_features.bias is None
    assert to_z.weight.shape == (4, 8, 1, 1) and to_z.bias is not None
    assert build.projection(tokenizer_config(tiny), None) is None


def test_a_weight_that_the_reference_does_not_use_is_refused(tiny):
    with pytest.raises(BadInput, match="pixelloss_weight"):
        build.loss_weights(tokenizer_config(tiny, "model.params.lossconfig.params.pixelloss_weight=2.0"))
