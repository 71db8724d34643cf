"""The reference's released files, and the hub: found, said, matched with each other, refused in one line."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pipeline.pieces import lightningdit, parts, statistics, tokenizer
from tiny import files

from vavae_fast import VAVAEPipeline
from vavae_fast.errors import BadInput
from vavae_fast.pipeline.parts import RELEASED, RELEASED_TOKENIZER, RELEASED_TOKENIZER_REPOSITORY

DIT = "lightningdit-xl-imagenet256-64ep.pt"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The three files in the reference's layout: the averaged weights of a training checkpoint, an LDM autoencoder's, mean and std."""
    folder = tmp_path_factory.mktemp("release")
    torch.manual_seed(0)
    model, other, vae = lightningdit(), lightningdit(), tokenizer()
    wrapped = {f"module.{name}": value for name, value in other.state_dict().items()}
    torch.save({"model": wrapped, "ema": model.state_dict(), "opt": {"state": {}, "param_groups": []}}, folder / DIT)
    of_training = {"loss.logvar": torch.zeros(()), "linear_proj.weight": torch.zeros(8, 4, 1, 1), "foundation_model.model.cls_token": torch.zeros(1)}
    torch.save({"state_dict": {**vae.state_dict(), **of_training}}, folder / RELEASED_TOKENIZER)
    mean, std = statistics()
    torch.save({"mean": mean, "std": std}, folder / "latents_stats.pt")
    return SimpleNamespace(folder=folder, model=model, other=other, tokenizer=vae, mean=mean, std=std)


def loaded(path, **more):
    return VAVAEPipeline.from_pretrained(path, device="cpu", **more)


def is_the_release(pipeline, release):
    networks = ((pipeline.lightningdit, release.model), (pipeline.tokenizer, release.tokenizer))
    same = all(torch.equal(value, ours.state_dict()[name]) for ours, theirs in networks for name, value in theirs.state_dict().items())
    return same and torch.equal(pipeline._parts.mean, release.mean) and torch.equal(pipeline._parts.std, release.std)


@pytest.mark.parametrize("name, scale, start", [(DIT, 10.0, 0.10), ("lightningdit-xl-imagenet256-800ep.pt", 6.7, 0.125)])
def test_released_files_are_drawn_from_as_they_were_published(release, tmp_path, name, scale, start):
    shutil.copytree(release.folder, tmp_path / "files")
    (tmp_path / "files" / DIT).rename(tmp_path / "files" / name)
    pipeline = loaded(tmp_path / "files")
    assert is_the_release(pipeline, release) and name in RELEASED
    sample, data = pipeline.config.sample, pipeline.config.data
    assert (sample.cfg_scale, sample.cfg_interval_start, sample.timestep_shift, sample.num_sampling_steps) == (scale, start, 0.3, 250)
    assert (sample.sampling_method, sample.cfg_channels, data.latent_norm, data.latent_multiplier) == ("euler", 3, True, 1.0)
    assert pipeline.image_size == 32 and pipeline.num_classes == 3
    images = pipeline([2], guidance_scale=10, num_inference_steps=4, seed=0).images
    assert images[0].size == (32, 32)


def test_the_weights_that_were_not_averaged_by_choice(release):
    pipeline = loaded(release.folder, weights="model")
    assert all(torch.equal(a, b) for a, b in zip(pipeline.lightningdit.state_dict().values(), release.other.state_dict().values(), strict=True))


def test_a_release_that_is_saved_is_the_same_pipeline(release, tmp_path):
    pipeline = loaded(release.folder)
    again = loaded(pipeline.save_pretrained(tmp_path / "saved"))
    assert is_the_release(again, release) and again.config == pipeline.config
    assert f"| converted from | {DIT} |" in (tmp_path / "saved" / "README.md").read_text()


def test_files_may_lie_apart(release, tmp_path):
    for name in (DIT, RELEASED_TOKENIZER, "latents_stats.pt"):
        (tmp_path / name[:4]).mkdir()
        shutil.copy(release.folder / name, tmp_path / name[:4] / name)
    dit, vae, stats = tmp_path / "ligh" / DIT, tmp_path / "vava" / RELEASED_TOKENIZER, tmp_path / "late" / "latents_stats.pt"
    with pytest.raises(BadInput, match=f"{RELEASED_TOKENIZER}: missing; give the tokenizer by tokenizer="):
        loaded(dit)
    with pytest.raises(BadInput, match="latents_stats.pt: missing; give it by latents_stats="):
        loaded(dit, tokenizer=vae)
    assert is_the_release(loaded(dit, tokenizer=vae, latents_stats=stats), release)
    shutil.copy(stats, vae.parent)
    assert is_the_release(loaded(str(dit), tokenizer=str(vae)), release), "statistics beside the tokenizer"


def test_a_file_of_another_name_needs_a_preset(release, tmp_path):
    shutil.copytree(release.folder, tmp_path / "files")
    (tmp_path / "files" / DIT).rename(tmp_path / "files" / "0080000.pt")
    with pytest.raises(BadInput, match="0080000.pt: not a released file's name.*give preset=, one of paper-64ep"):
        loaded(tmp_path / "files" / "0080000.pt")
    pipeline = loaded(tmp_path / "files" / "0080000.pt", preset="paper-ablation")
    assert is_the_release(pipeline, release) and pipeline.config.sample.sampling_method == "dopri5"


def test_two_released_models_in_a_folder_are_told_apart_by_the_caller(release, tmp_path):
    shutil.copytree(release.folder, tmp_path / "files")
    other = tmp_path / "files" / "lightningdit-xl-imagenet256-800ep.pt"
    shutil.copy(release.folder / DIT, other)
    with pytest.raises(BadInput, match=f"holds {DIT}, {other.name}; give the path of one of them"):
        loaded(tmp_path / "files")
    assert loaded(other).config.sample.cfg_scale == 6.7


def test_files_that_do_not_belong_together(release, tmp_path):
    torch.manual_seed(1)
    torch.save({"state_dict": tokenizer(embed_dim=8).state_dict()}, tmp_path / "other.pt")
    torch.save(dict(zip(("mean", "std"), statistics(8))), tmp_path / "stats.pt")
    for given, words in (
        (dict(tokenizer=tmp_path / "other.pt"), "other.pt: the tokenizer has 8 latent channels, model.in_chans is 4"),
        (dict(latents_stats=tmp_path / "stats.pt"), r"stats.pt: expected mean and std of shape \(1, 4, 1, 1\)"),
        (dict(latents_stats=tmp_path / "none.pt"), "latents_stats: .*none.pt is no file"),
        (dict(weights="best"), "weights: must be 'ema' or 'model'"), (dict(fused="yes"), "fused: must be True, False or 'auto'"),
        (dict(revision="main"), "revision: must be left out for a path"), (dict(preset="best"), "preset: must be one of"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=words) as caught:
            loaded(release.folder, **given)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content, words", [
    (b"", "the file is empty"), (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"), (b"<!doctype html>", "a web page"),
    (b"PK\x03\x04 broken", "not a PyTorch file, or damaged"), (None, "not the weights of a LightningDiT"),
])  # fmt: skip
def test_a_download_that_went_wrong(release, tmp_path, content, words):
    shutil.copytree(release.folder, tmp_path / "files")
    if content is None:
        torch.save({"ema": {"weight": torch.zeros(1)}}, tmp_path / "files" / DIT)
    else:
        (tmp_path / "files" / DIT).write_bytes(content)
    with pytest.raises(BadInput, match=words) as caught:
        loaded(tmp_path / "files")
    assert DIT in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: (path / "lightningdit").mkdir(parents=True)])
def test_a_folder_of_something_else(tmp_path, make):
    make(tmp_path / "folder")
    with pytest.raises(BadInput, match="no saved pipeline, no run .* and no released lightningdit-"):
        loaded(tmp_path / "folder")


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of local folders: its client's three functions, and what was asked of them."""
    asked, root = [], tmp_path / "hub"

    def snapshot_download(repository, revision=None, allow_patterns=None, local_files_only=False):
        asked.append((repository, revision, local_files_only))
        if not (root / repository).is_dir():
            raise OSError("404 Client Error.\n\nRepository Not Found for url.\nPlease make sure you specified the correct `repo_id`.")
        target = tmp_path / "cache" / repository
        for file in (root / repository).iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        return str(target)

    class HfApi:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repository, private, exist_ok):
            if self.token == "wrong":
                raise OSError("401 Unauthorized")
            asked.append(("create", repository, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, revision, commit_message):
            shutil.copytree(folder_path, root / repo_id)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download, HfApi=HfApi))
    return SimpleNamespace(asked=asked, root=root)


def test_pushed_and_pulled_it_is_the_same(hub, capsys, tmp_path):
    pipeline = VAVAEPipeline(parts(), device="cpu")
    assert pipeline.push_to_hub("me/model", license="mit") == "https://hub/me/model/commit/1"
    assert hub.asked == [("create", "me/model", True, True)], "private unless told otherwise"
    assert 'from_pretrained("me/model")' in (hub.root / "me/model" / "README.md").read_text()
    (hub.root / "me/model" / "optimizer.bin").write_bytes(b"large")
    again = loaded("me/model", revision="v1")
    assert hub.asked[1:] == [("me/model", "v1", False)] and "optimizer.bin" not in files(tmp_path / "cache")
    assert all(torch.equal(a, b) for a, b in zip(again.lightningdit.state_dict().values(), pipeline.lightningdit.state_dict().values()))
    said = capsys.readouterr().err
    assert "me/model: no such path here; fetching it at v1 from the Hugging Face hub" in said and "*.safetensors" in said
    loaded("me/model", local_files_only=True)
    assert hub.asked[2:] == [("me/model", None, True)] and not capsys.readouterr().err
    with pytest.raises(BadInput, match="me/model: .*401 Unauthorized"):
        pipeline.push_to_hub("me/model", token="wrong")


def test_the_reference_s_repositories_are_fetched_together(hub, release, capsys):
    """The LightningDiT lies in one, tokenizer and statistics in another."""
    dit, vae = hub.root / "hustvl" / "lightningdit-xl-imagenet256-64ep", hub.root / RELEASED_TOKENIZER_REPOSITORY
    for folder, names in ((dit, (DIT,)), (vae, (RELEASED_TOKENIZER, "latents_stats.pt"))):
        folder.mkdir(parents=True)
        for name in names:
            shutil.copy(release.folder / name, folder)
    assert is_the_release(loaded("hustvl/lightningdit-xl-imagenet256-64ep"), release)
    assert [name for name, *_ in hub.asked] == ["hustvl/lightningdit-xl-imagenet256-64ep", RELEASED_TOKENIZER_REPOSITORY]
    assert RELEASED_TOKENIZER_REPOSITORY in capsys.readouterr().err
    hub.asked.clear()
    assert is_the_release(loaded(release.folder, tokenizer=RELEASED_TOKENIZER_REPOSITORY), release)
    assert [name for name, *_ in hub.asked] == [RELEASED_TOKENIZER_REPOSITORY]
    with pytest.raises(BadInput, match="holds no vavae.*.pt; fetch the tokenizer, and give its path"):
        loaded(release.folder, tokenizer="hustvl/lightningdit-xl-imagenet256-64ep")


def test_local_files_alone_never_reach_for_the_hub(hub, release, tmp_path):
    shutil.copytree(release.folder, tmp_path / "files")
    (tmp_path / "files" / RELEASED_TOKENIZER).unlink()
    with pytest.raises(BadInput, match=f"fetch it from {RELEASED_TOKENIZER_REPOSITORY}"):
        loaded(tmp_path / "files")
    assert not hub.asked


@pytest.mark.parametrize("path, words", [
    ("me/nothing", "me/nothing: not a path here, and the hub says: Please make sure you specified the correct `repo_id`."),
    ("nowhere", "nowhere: no such file or folder; check the path, or give owner/name"), ("a/b/c", "a/b/c: no such file or folder"),
    (Path("me/model"), "me/model: no such file or folder"), ("", "no such file or folder"),
])  # fmt: skip
def test_what_is_neither_here_nor_there(hub, path, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as caught:
        loaded(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_hub_s_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadInput, match="me/model: not a path here, and huggingface_hub.*is not installed; .*pip install 'vavae-fast\\[hub\\]'"):
        loaded("me/model")
    with pytest.raises(BadInput, match="huggingface_hub.*is not installed"):
        VAVAEPipeline(parts(), device="cpu").push_to_hub("me/model")


def test_the_real_client_without_a_network(monkeypatch, tmp_path):
    """Its errors are ours, in one line; its cache in the layout that it keeps is read."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="me/model: not a path here, and the hub says: ") as caught:
        loaded("me/model", local_files_only=True)
    assert "\n" not in str(caught.value)
    kept, commit = tmp_path / "cache" / "models--me--model", "0" * 40
    pipeline = VAVAEPipeline(parts(), device="cpu")
    pipeline.save_pretrained(kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    again = loaded("me/model", local_files_only=True)
    assert torch.equal(again.lightningdit.pos_embed, pipeline.lightningdit.pos_embed)
