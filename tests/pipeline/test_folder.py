"""A pipeline's folder: the same bits come back, and what is not what was written is refused."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
from pipeline.pieces import CONFIG, parts
from tiny import contents, files

from vavae_fast import VAVAEPipeline, artifacts
from vavae_fast.errors import BadInput
from vavae_fast.parsing import parse_yaml

FILES = ["README.md", "config.json", "latents_stats.pt", "lightningdit.safetensors", "manifest.json", "tokenizer.safetensors"]


@pytest.fixture(scope="module")
def pipeline():
    return VAVAEPipeline(parts(class_names=("ant", "bee", "cicada")), device="cpu")


@pytest.fixture
def saved(pipeline, tmp_path):
    return pipeline.save_pretrained(tmp_path / "saved")


def bits(pipeline):
    networks = (pipeline.lightningdit, pipeline.tokenizer)
    return [value for network in networks for _, value in sorted(network.state_dict().items())] + [pipeline._parts.mean, pipeline._parts.std]


def loaded(path, **more):
    return VAVAEPipeline.from_pretrained(path, device="cpu", **more)


def test_what_is_saved_comes_back_bit_for_bit(pipeline, saved):
    again = loaded(saved)
    assert files(saved) == FILES
    assert all(torch.equal(a, b) for a, b in zip(bits(again), bits(pipeline), strict=True))
    assert again.config == pipeline.config and again.labels == pipeline.labels and again._parts.origin == pipeline._parts.origin
    draw = lambda p: [image.tobytes() for image in p(["bee", 0, 2, 1, 1], seed=3).images]
    assert draw(again) == draw(pipeline)


def test_it_may_be_moved_and_is_saved_again_to_the_same_bytes(saved, tmp_path):
    moved = tmp_path / "moved"
    os.rename(saved, moved)
    again = loaded(str(moved)).save_pretrained(tmp_path / "again", name="saved")
    before, after = contents(moved, "*"), contents(again, "*")
    for name in FILES:
        timeless = [re.sub(rb'\d{4}-\d\d-\d\dT[\d:+-]+|"seal": "\w+"', b"", data[name]) for data in (before, after)]
        assert timeless[0] == timeless[1], name


def test_every_use_before_saving_leaves_the_bits(tmp_path):
    used = VAVAEPipeline(parts(), device="cpu", dtype=torch.bfloat16)
    used([0], seed=0)
    used.save_pretrained(tmp_path / "used")
    fresh = VAVAEPipeline(parts(), device="cpu").save_pretrained(tmp_path / "fresh")
    for name in ("lightningdit.safetensors", "tokenizer.safetensors", "latents_stats.pt"):
        assert (tmp_path / "used" / name).read_bytes() == (fresh / name).read_bytes()
    assert loaded(tmp_path / "used").dtype == torch.bfloat16, "the precision is a setting, and is kept"


def test_latents_that_were_not_normalised_need_no_statistics(tmp_path):
    made_of = parts(data=dict(CONFIG["data"], latent_norm=False, latent_multiplier=0.5))
    made_of = replace(made_of, mean=torch.zeros(1, 4, 1, 1), std=torch.ones(1, 4, 1, 1))
    pipeline = VAVAEPipeline(made_of, device="cpu")
    saved = pipeline.save_pretrained(tmp_path / "saved")
    assert "latents_stats.pt" not in files(saved)
    draw = lambda p: p([0, 1], seed=0, output_type="latent").images
    assert torch.equal(draw(loaded(saved)), draw(pipeline))


def test_presets_replace_the_sampler_s_settings(saved):
    sample = loaded(saved, preset="paper-800ep").config.sample
    assert (sample.cfg_scale, sample.cfg_interval_start, sample.num_sampling_steps, sample.timestep_shift) == (6.7, 0.125, 250, 0.3)
    with pytest.raises(BadInput, match="preset: must be one of paper-64ep, paper-800ep"):
        loaded(saved, preset="paper")


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("README.md", "manifest.json")])
def test_a_changed_byte_is_refused_by_its_hash(saved, name):
    content = bytearray((saved / name).read_bytes())
    content[-20] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(BadInput, match=rf"{name} is damaged \(its hash is not the manifest's\); fetch it again"):
        loaded(saved)


@pytest.mark.parametrize("harm, words", [
    (lambda folder: (folder / "manifest.json").unlink(), r"incomplete \(no manifest.json\)"),
    (lambda folder: (folder / "config.json").unlink(), "lacks config.json; fetch it again"),
    (lambda folder: os.truncate(folder / "lightningdit.safetensors", 1000), "lightningdit.safetensors has 1,000 bytes, its manifest says"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: not valid JSON"),
    (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json: not a pipeline's manifest"),
    (lambda folder: (folder / "manifest.json").write_text('{"kind": "pipeline", "files": {}}'), "manifest.json: not a pipeline's manifest"),
    (lambda folder: (folder / "tokenizer.safetensors").unlink(), "lacks tokenizer.safetensors; fetch it again"),
])  # fmt: skip
def test_a_folder_that_is_not_whole(saved, harm, words):
    harm(saved)
    with pytest.raises(BadInput, match=words) as caught:
        loaded(saved)
    assert "\n" not in str(caught.value)


def test_a_manifest_whose_files_are_no_files(saved):
    manifest = artifacts.read_json(saved / "manifest.json")
    for facts in ({}, None, "x"):
        artifacts.write_json(saved / "manifest.json", manifest | dict(files=dict.fromkeys(manifest["files"], facts)))
        with pytest.raises(BadInput, match="manifest.json: not a pipeline's manifest, or damaged"):
            loaded(saved)


def test_a_config_of_a_later_version_says_so(saved):
    config = artifacts.read_json(saved / "config.json")
    config["sample"]["unheard_of"] = 1
    (saved / "config.json").write_text(json.dumps(config))
    manifest = artifacts.read_json(saved / "manifest.json")
    manifest["files"]["config.json"] = dict(bytes=(saved / "config.json").stat().st_size, sha256=artifacts.sha256(saved / "config.json"))
    manifest["versions"]["vavae_fast"] = "9.9"
    artifacts.write_json(saved / "manifest.json", manifest)
    with pytest.raises(BadInput, match="config.json: unknown key sample.unheard_of.*; it was written by vavae-fast 9.9"):
        loaded(saved)


def test_an_edited_card_is_no_fault(saved):
    (saved / "README.md").write_text("mine")
    loaded(saved)


def test_other_people_s_files_are_not_written_over(pipeline, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(BadInput, match="holds other files; choose an empty folder"):
        pipeline.save_pretrained(tmp_path)
    assert files(tmp_path) == ["README.md"]
    clone = tmp_path / "clone"
    (clone / ".git").mkdir(parents=True)
    assert files(pipeline.save_pretrained(clone)) == FILES
    with pytest.raises(BadInput, match="is a file, not a folder"):
        pipeline.save_pretrained(tmp_path / "README.md")


def test_a_pipeline_is_replaced_and_an_interrupted_one_is_incomplete(pipeline, saved, monkeypatch):
    other = VAVAEPipeline(parts(sample=dict(CONFIG["sample"], cfg_scale=3.0)), device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr("vavae_fast.pipeline.card.render", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            other.save_pretrained(saved)
    with pytest.raises(BadInput, match="incomplete"):
        loaded(saved)
    other.save_pretrained(saved)
    assert loaded(saved).config.sample.cfg_scale == 3.0 and files(saved) == FILES


def front_matter(card):
    return parse_yaml(card.split("---\n")[1], "card")


def test_the_card_is_made_of_the_manifest(pipeline, tmp_path):
    protocol = dict(samples="/home/me/samples.npz", num_samples=50000, warnings=["a"])
    metrics = dict(kind="metrics", format=1, fid=2.11, protocol=protocol)
    artifacts.write_json(tmp_path / "metrics.json", dict(metrics, inception_score=256.4))
    saved = pipeline.save_pretrained(tmp_path / "my_model", license="cc-by-4.0", metrics=[metrics, tmp_path / "metrics.json"])
    card = (saved / "README.md").read_text()
    assert front_matter(card)["license"] == "cc-by-4.0" and front_matter(card)["library_name"] == "vavae-fast"
    for words in ("# my_model", 'VAVAEPipeline.from_pretrained("my_model")', "3 classes", "32 x 32 pixels", "| guidance scale (1: none) | 1.5 |",
                  "| fid | 2.1100 |", "| inception_score | 256.4000 |", "samples samples.npz, num_samples 50000", "names from `pipeline.labels`",
                  artifacts.sha256(saved / "lightningdit.safetensors"), "| weights | ema |"):  # fmt: skip
        assert words in card, words
    manifest = (saved / "manifest.json").read_text()
    assert "/home/me" not in card + manifest and str(tmp_path) not in card + manifest, "paths of this machine are not published"


def test_a_card_says_what_is_not_known(saved):
    card = (saved / "README.md").read_text()
    assert "Not yet measured." in card and "Not stated by who saved this" in card and "license" not in front_matter(card)


@pytest.mark.parametrize("given, words", [
    (dict(license="my licence"), "license: must be a name of the hub's list"), (dict(metrics={}), "metrics: no scores"),
    (dict(metrics={"fid": "low"}), "metrics: no scores"), (dict(metrics="nowhere.json"), "nowhere.json: no such file"),
    (dict(metrics={"fid": 2.0, "protocol": "adm"}), "metrics: no scores"),
])  # fmt: skip
def test_what_cannot_stand_in_a_card(pipeline, tmp_path, given, words):
    with pytest.raises(BadInput, match=words):
        pipeline.save_pretrained(tmp_path / "saved", **given)
    assert not (tmp_path / "saved").exists()


def test_what_metrics_and_names_say_is_text_in_the_card(pipeline, tmp_path):
    hostile = "<img src=x onerror=alert(1)> [x](javascript:alert(1)) | `x`\n# heading"
    name = '"); import os; os.system("true'
    saved = pipeline.save_pretrained(tmp_path / "saved", name=name, metrics=[{"fid": 2.0, hostile: 3.0, "protocol": {hostile: hostile}}])
    card = (saved / "README.md").read_text()
    assert "alert(1)" in card and "<img" not in card and "\n# heading" not in card
    assert not re.search(r"(?<!\\)\[x\]", card) and not re.search(r"(?<!\\)`x", card)
    assert "system" not in compile(card.split("```python")[1].split("```")[0], "card", "exec").co_names
