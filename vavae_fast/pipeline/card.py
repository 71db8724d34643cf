"""The model card of a pipeline, from its manifest: nothing in it is written by hand, and what was not measured is said to be so."""

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from vavae_fast.artifacts import readable_bytes
from vavae_fast.config import LightningDiTConfig

_TEMPLATE = """---
library_name: vavae-fast
{license_line}pipeline_tag: unconditional-image-generation
tags:
- class-conditional
- image-generation
- lightningdit
- va-vae
---

# {name}

{model} ({parameters:.2f} M parameters) on latents of {channels} channels, {ratio} times smaller than the image: class-conditional images
of {size} x {size} pixels, {classes:,} classes. Method: VA-VAE and LightningDiT, Yao et al. 2025 (arXiv 2501.01423).

## Use

```python
# pip install vavae-fast
from vavae_fast import VAVAEPipeline

pipeline = VAVAEPipeline.from_pretrained({name_in_code})
images = pipeline(labels=[{label}], seed=0).images  # PIL images; image i depends on (seed, i) alone
images[0].save("{label}.png")
```

`labels` are class numbers from 0 to {last}{names}. Other settings than those below: `guidance_scale`, `guidance_interval`,
`num_inference_steps`, `timestep_shift`, `sampler`, or `from_pretrained(..., preset=...)`.

## Sampler

{sampler}

## Training

{training}

## Metrics

{metrics}

## Files

{files}

## Licence

{license}

Written by vavae-fast {version} on {time}.
"""

_SAMPLER = {
    "mode": "mode",
    "sampling_method": "method",
    "num_sampling_steps": "times (one more than steps)",
    "timestep_shift": "timestep shift",
    "cfg_scale": "guidance scale (1: none)",
    "cfg_interval_start": "guidance from time (0 is noise)",
    "cfg_interval_end": "guidance up to time",
    "cfg_channels": "guided channels",
}
_TRAINING = {
    "run": "run",
    "file": "converted from",
    "weights": "weights",
    "sha256": "sha256 of the weights there",
    "steps": "steps",
    "batch": "batch",
    "epochs": "epochs",
    "latents": "latents in the training set",
    "lr": "learning rate",
    "beta2": "beta2 of AdamW",
    "max_grad_norm": "gradient norm clipped to",
    "ema_decay": "decay of the averaged weights",
    "seed": "seed",
    "tokenizer_sha256": "sha256 of the tokenizer that made the latents",
}


def render(name: str, config: LightningDiTConfig, manifest: Mapping[str, Any], named: bool) -> str:
    """The text of README.md. `name`: a hub id, or the folder's name; named: whether the classes have names."""
    origin, license = manifest["origin"], manifest["license"]
    facts = {**origin, **(origin.get("training") or {})}
    classes = config.data.num_classes
    label = min(207, classes - 1)
    model = config.model.model_type if config.model.model_type != "custom" else "A LightningDiT of its own size"
    return _TEMPLATE.format(
        name=_text(name), name_in_code=json.dumps(name), model=_text(model),
        parameters=manifest["parameters"] / 1e6, channels=config.model.in_chans, ratio=config.vae.downsample_ratio,
        size=config.data.image_size, classes=classes, label=label, last=classes - 1,
        names=", or names from `pipeline.labels`" if named else "",
        license_line=f"license: {license}\n" if license else "",
        license=f"{license}." if license else "Not stated by who saved this; ask before you use it.",
        sampler=_table(("setting", "value"), ((word, manifest["sampler"][key]) for key, word in _SAMPLER.items())),
        training=_table(("what", "value"), ((word, facts[key]) for key, word in _TRAINING.items() if facts.get(key) is not None)),
        metrics="\n\n".join(map(_metrics, manifest["metrics"])) or "Not yet measured.",
        files=_table(("file", "size", "sha256"), ((f, readable_bytes(v["bytes"]), v["sha256"]) for f, v in manifest["files"].items())),
        version=manifest["versions"]["vavae_fast"], time=manifest["time"],
    )  # fmt: skip


def _metrics(metrics: Mapping[str, Any]) -> str:
    """One evaluation: its scores, then what they were measured with, without which they say nothing."""
    scores = _table(("metric", "value"), ((key, f"{value:.4f}") for key, value in metrics.items() if key != "protocol"))
    protocol = ", ".join(_text(f"{key} {value}") for key, value in metrics["protocol"].items() if isinstance(value, str | int | float))
    return f"{scores}\n\nProtocol: {protocol or 'not given'}."


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_text, line)) + " |" for line in lines)


def _text(value: Any) -> str:
    """A value as text and nothing else: no HTML, no link, no end of a cell or a line."""
    text = escape(" ".join(str(value).split()), quote=False)
    return text.replace("|", "\\|").replace("[", "\\[").replace("`", "\\`")
