"""Files of foundation models in each project's layout, written by hand here; and files that are of something else."""

import functools
import importlib.util
import re
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from vavae_fast.errors import BadInput
from vavae_fast.models import foundation
from vavae_fast.models.foundation import create_foundation_model
from vavae_fast.models.foundation_models import FOUNDATION_MODELS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed (vavae-fast[encoders])")
TINY = "timm:vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def one_block(monkeypatch):
    """Every transformer is one block deep."""
    build = foundation.build_transformer
    monkeypatch.setattr(foundation, "build_transformer", lambda name, from_hub=False, depth=1: build(name, from_hub, depth=1))


@functools.cache
def weights(name: str) -> dict[str, torch.Tensor]:
    """Random weights of a model, by timm's names."""
    timm_name = FOUNDATION_MODELS[name].timm if name in FOUNDATION_MODELS else name.removeprefix("timm:")
    with torch.device("meta"):
        shapes = foundation.build_transformer(timm_name, depth=1).state_dict()
    values = torch.randn(1 << 16, generator=torch.Generator().manual_seed(len(name)))
    return {k: values.repeat(-(-v.numel() // len(values)))[: v.numel()].view(v.shape) for k, v in shapes.items()}


def renamed(state, *pairs, prefix=""):
    out = {}
    for key, value in state.items():
        for new, old in pairs:
            key = re.sub(old, new, key)
        out[prefix + key] = value
    return out


def dinov2(state):
    return state | {"mask_token": torch.zeros(1, 384)}


def dinov2_with_registers(state):
    """The class token's position is a row of the table; timm has it in the token."""
    state = dict(state)
    position = torch.randn(1, 1, 384)
    state["cls_token"] = state["cls_token"] - position
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    state["register_tokens"] = state.pop("reg_token")
    return state | {"mask_token": torch.zeros(1, 384)}


def dinov2_swiglu(state):
    return renamed(state, (".mlp.w12.", r"\.mlp\.fc1\."), (".mlp.w3.", r"\.mlp\.fc2\.")) | {"mask_token": torch.zeros(1, 1536)}


def dinov3(state):
    """Biases of q and v that training left at zero, and of k that a mask keeps there."""
    state = renamed(state, ("storage_tokens", "reg_token"), (r".ls\1.gamma", r"\.gamma_(.)"))
    bias = torch.cat([torch.zeros(384), torch.full((384,), 7.0), torch.zeros(384)])
    return state | {"blocks.0.attn.qkv.bias": bias, "blocks.0.attn.qkv.bias_mask": torch.ones(1152), "rope_embed.periods": torch.ones(16),
                    "mask_token": torch.zeros(1, 384)}  # fmt: skip


def mae_with_decoder(state):
    decoder = {"mask_token": torch.zeros(1, 1, 512), "decoder_pos_embed": torch.zeros(1, 197, 512), "decoder_norm.bias": torch.zeros(512)}
    return {"model": state | decoder}


def clip(state):
    state = renamed(state, ("conv1.", r"patch_embed\.proj\."), ("transformer.resblocks.", "blocks."), ("ln_pre", "norm_pre"),
                    ("ln_post", r"^norm(?=\.)"), (r".ln_\1", r"\.norm(.)"), (".in_proj_", r"\.qkv\."), (".out_proj.", r"(?<=attn)\.proj\."),
                    (".c_fc.", r"\.fc1\."), (".c_proj.", r"\.fc2\."), prefix="visual.")  # fmt: skip
    state["visual.class_embedding"] = state.pop("visual.cls_token").flatten()
    state["visual.positional_embedding"] = state.pop("visual.pos_embed")[0]
    text = {"visual.proj": torch.zeros(768, 512), "text_projection": torch.zeros(2, 2), "transformer.resblocks.0.ln_1.weight": torch.zeros(2),
            "positional_embedding": torch.zeros(77, 2), "logit_scale": torch.tensor(1.0), "input_resolution": torch.tensor(224)}  # fmt: skip
    return state | text


def openclip_on_timm(state):
    other = {"visual.trunk.attn_pool.latent": torch.zeros(1, 1, 2), "text.token_embedding.weight": torch.zeros(2, 2), "logit_bias": torch.zeros(1)}
    return renamed(state, prefix="visual.trunk.") | other


def sam(state):
    state = renamed(state, (".mlp.lin", r"\.mlp\.fc"), prefix="image_encoder.")
    return state | {"prompt_encoder.not_a_point_embed.weight": torch.zeros(1, 256), "mask_decoder.iou_token.weight": torch.zeros(1, 256)}


def ijepa(state):
    encoder = renamed(state, prefix="module.")
    target = {key: torch.zeros_like(value) for key, value in encoder.items()}
    return {"encoder": encoder, "predictor": {"module.mask_token": torch.zeros(1)}, "opt": {}, "scaler": None, "target_encoder": target, "epoch": 300}


def ijepa_target_alone(state):
    return {"target_encoder": renamed(state, prefix="module."), "epoch": 300}


def timm_with_heads(state):
    heads = {"head.weight": torch.zeros(3, 768), "fc_norm.bias": torch.zeros(768), "attn_pool.latent": torch.zeros(1, 1, 768)}
    return state | heads


LAYOUTS = {
    "dinov2-small": dinov2, "dinov2-reg-small": dinov2_with_registers, "dinov2-giant": dinov2_swiglu, "dinov3-small": dinov3,
    "mae-base": mae_with_decoder, "clip-base": clip, "siglip2-base": openclip_on_timm, "sam-base": sam, "ijepa": ijepa,
    "ijepa-16": ijepa_target_alone, "siglip2-base-512": timm_with_heads, "dinov3-base": dict, "sam": dict,
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_projects_own_file(tmp_path, name):
    expected = weights(name)
    content = LAYOUTS[name](expected)
    path = tmp_path / ("w.safetensors" if LAYOUTS[name] is dict else "w.pth.tar")
    save_file(content, path) if LAYOUTS[name] is dict else torch.save(content, path)
    loaded = create_foundation_model(name, weights=path).model.transformer.state_dict()
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(loaded[key], value, rtol=0, atol=1e-6 if key == "cls_token" else 0, msg=key)


def test_half_precision_files_are_widened(tmp_path):
    """As OpenAI's are."""
    torch.save({k: v.half() for k, v in clip(weights("clip-base")).items()}, tmp_path / "w.pt")
    model = create_foundation_model("clip-base", weights=tmp_path / "w.pt")
    assert next(model.model.parameters()).dtype == torch.float32


def refused(path, name, *words):
    with pytest.raises(BadInput) as caught:
        create_foundation_model(name, weights=path)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500 and all(word in line for word in (str(path), *words)), line


@pytest.mark.parametrize(("name", "owner", "misfit"), [
    ("dinov2-small", "dinov2-base", "cls_token is (1, 1, 768), expected (1, 1, 384)"),
    ("dinov2-reg-small", "dinov2-small", "pos_embed is (1, 1370, 384), expected (1, 1369, 384)"),
    ("dinov2", "mae", "pos_embed is (1, 197, 1024), expected (1, 1370, 1024)"),
    ("mae-base", "clip-base", "it has no patch_embed.proj.bias but norm_pre.weight"),
    ("siglip2-base", "siglip2-base-512", "pos_embed is (1, 1024, 768), expected (1, 256, 768)"),
    ("clip-base", "sam-base", "pos_embed is (1, 64, 64, 768), expected (1, 197, 768)"),
    ("ijepa-16", "ijepa", "pos_embed is (1, 256, 1280), expected (1, 784, 1280)"),
    ("mae-base", "dinov3-base", "it has no pos_embed but reg_token"),
])  # fmt: skip
def test_another_models_file_is_named_with_its_owner(tmp_path, name, owner, misfit):
    """In the owner's own layout where it has one, so that conversion depends on the file alone."""
    torch.save(LAYOUTS.get(owner, dict)(weights(owner)), tmp_path / "w.pth")
    refused(tmp_path / "w.pth", name, f"not the weights of {name} ({FOUNDATION_MODELS[name].timm})", misfit, f"set model.params.use_vf={owner}")


def test_files_of_nothing_that_we_know(tmp_path):
    state = dict(weights(TINY))
    state["blocks.0.attn.qkv.weights"] = state.pop("blocks.0.attn.qkv.weight")
    torch.save(state, tmp_path / "typo.pth")
    refused(tmp_path / "typo.pth", TINY, "it has no blocks.0.attn.qkv.weight but blocks.0.attn.qkv.weights; give a file of vit_tiny_patch16_224")
    torch.save({"layer1.0.conv1.weight": torch.zeros(2, 2)}, tmp_path / "resnet.pth")
    refused(tmp_path / "resnet.pth", "dinov2-small", "it has no cls_token but layer1.0.conv1.weight", "give a file of vit_small_patch14_dinov2")
    torch.save(weights(TINY) | {"blocks.1.norm1.bias": torch.zeros(192)}, tmp_path / "deeper.pth")
    refused(tmp_path / "deeper.pth", TINY, "blocks.1.norm1.bias has no place in the model")


def test_a_file_of_transformers_is_named(tmp_path):
    torch.save({"embeddings.patch_embeddings.projection.weight": torch.zeros(384, 3, 14, 14)}, tmp_path / "hf.bin")
    refused(tmp_path / "hf.bin", "dinov2-small", "the layout of Hugging Face transformers", "as timm or the model's own project publishes it")


def test_dinov3_with_biases_that_count(tmp_path):
    """Meta's S, B and L have zeros there; a model without them would compute something else."""
    state = dinov3(weights("dinov3-small"))
    state["blocks.0.attn.qkv.bias"][0] = 0.5
    torch.save(state, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "dinov3-small", "blocks.0.attn.q_bias has no place in the model")
    loaded = create_foundation_model("timm:vit_small_patch16_dinov3_qkvb", weights=tmp_path / "w.pth").model.transformer
    assert loaded.blocks[0].attn.q_bias[0] == 0.5 and not loaded.blocks[0].attn.v_bias.any()


def test_torchscript_is_code(tmp_path):
    """The form in which OpenAI publishes CLIP."""
    with zipfile.ZipFile(tmp_path / "ViT-B-16.pt", "w") as archive:
        for member in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"ViT-B-16/{member}", b"3")
    refused(tmp_path / "ViT-B-16.pt", "clip-base", "TorchScript archive", "torch.jit.load(FILE).state_dict()")
