"""VAVAEPipeline: class labels in, images out, called as diffusers' DiTPipeline is."""

import copy
import difflib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

from vavae_fast import artifacts, rng
from vavae_fast.commands import build
from vavae_fast.commands.networks import sampler_settings
from vavae_fast.config import SampleConfig
from vavae_fast.errors import BadInput, is_integer, is_number, require
from vavae_fast.flow.generate import LatentScale, SamplerSettings, generate_images, generate_latents
from vavae_fast.flow.samplers import ODE_METHODS, SDE_SAMPLERS
from vavae_fast.models.autoencoder import DiagonalGaussian
from vavae_fast.models.fp8 import require_fp8
from vavae_fast.models.inference import decoder, matmul_precision, predictor
from vavae_fast.pipeline import folder, hub
from vavae_fast.pipeline.images import OUTPUTS, as_input, as_output
from vavae_fast.pipeline.parts import Parts
from vavae_fast.pipeline.sources import find
from vavae_fast.pixels import to_uint8

Labels = int | str | Sequence[int | str] | np.ndarray | Tensor
Metrics = Mapping[str, Any] | str | Path  # what `evaluate --json` wrote, or where

SAMPLERS = {name: ("ODE", name) for name in ODE_METHODS} | {f"sde-{name}": ("SDE", name) for name in SDE_SAMPLERS}
_PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_WORDS = get_args(get_type_hints(SampleConfig)["precision"])
_MAX_SEED = 2**63 - 1
_DECODED = 32  # latents at once, as `generate_images` decodes them


@dataclass(frozen=True)
class VAVAEPipelineOutput:
    """images: as `output_type` says; labels: the class of each; seed: what draws them again, given the same settings."""

    images: Any
    labels: list[int]
    seed: int


class VAVAEPipeline:
    """A LightningDiT, its tokenizer and the statistics of its latents, ready to draw on one device.

    `lightningdit` and `tokenizer` are the networks as they were loaded, on the CPU in float32, and what `save_pretrained` writes; what
    runs is a copy of them on `device`, made at the first call. `config` holds the sampler's defaults (`config.sample`).
    """

    def __init__(
        self, parts: Parts, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None, compile: str = "none"
    ):
        channels = parts.config.model.in_chans
        found = dict(tokenizer=parts.tokenizer.embed_dim, mean=parts.mean.numel(), std=parts.std.numel())
        if set(found.values()) != {channels}:
            counts = ", ".join(f"{name} {count}" for name, count in found.items())
            raise BadInput(f"channels: {counts}, the LightningDiT {channels}; give tokenizer and statistics of the latents it was trained on")
        require(compile in ("none", "blocks", "model"), "compile", compile, "none, blocks or model")
        self._parts, self._compile, self._running = parts, compile, None
        self.config, self.lightningdit, self.tokenizer = parts.config, parts.lightningdit, parts.tokenizer
        self.transport = build.transport(self.config.transport, self.config.train.fused)
        self.to(_device(device), dtype)

    # -- where it comes from, where it goes ---------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        fused: bool | str = "auto",
        preset: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        tokenizer: str | Path | None = None,
        latents_stats: str | Path | None = None,
        weights: str | None = None,
        compile: str = "none",
    ) -> "VAVAEPipeline":
        """A pipeline from `path`: a folder of `save_pretrained`; a LightningDiT run folder of ours, or one of its checkpoints; or the
        reference's released files, as a folder or as the LightningDiT's file with the others beside it.

        A string that is no path here is a repository of the Hugging Face hub, at `revision`; what is fetched is said on stderr, and
        nothing is with local_files_only. Everything saved by us is checked against its hashes.
        dtype: of matrix products, torch.float32 or torch.bfloat16, or a word of sample.precision; by default bfloat16 on a GPU.
        device: the GPU where there is one by default. fused: the operators of vavae_kernels; "auto" has them on a GPU.
        preset: published sampler settings ("paper-64ep", …) in place of the model's own; released files bring theirs by their name.
        tokenizer, latents_stats: in place of those that a run's config names or that lie beside a released file; weights: "ema" or
        "model" of a run. compile: "blocks" or "model" by torch.compile, for many batches of one size.
        `BadInput` (a ValueError) in one line for whatever is missing, damaged or does not fit.
        """
        device = _device(device)
        require(fused in (True, False, "auto"), "fused", fused, "True, False or 'auto'")
        fuses = device.type == "cuda" if fused == "auto" else fused
        found = find(path, fuses, preset, revision, local_files_only, tokenizer, latents_stats, weights)
        return cls(found, device, dtype, compile)

    def save_pretrained(
        self, path: str | Path, *, license: str | None = None, metrics: Sequence[Metrics] | Metrics = (), name: str | None = None
    ) -> Path:
        """Write the folder that `from_pretrained` reads: networks in float32, statistics, config, model card, manifest with all hashes.

        `path` is absent, empty, or a pipeline's folder, which is replaced. license: a name of the hub's list, as "apache-2.0"; metrics:
        what `vavae-fast evaluate --json` wrote, for the card; name: by which the card loads it, the folder's name by default.
        """
        path = Path(path)
        folder.write(replace(self._parts, config=self.config), path, name or path.resolve().name, license, _read_metrics(metrics))
        return path

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = True,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Pipeline of vavae-fast",
        license: str | None = None,
        metrics: Sequence[Metrics] | Metrics = (),
    ) -> str:
        """`save_pretrained` into `owner/name` of the Hugging Face hub, made if it is not there (private by default); the commit's address."""
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(temporary, license=license, metrics=metrics, name=repository)
            return hub.push(Path(temporary), repository, private, token, revision, commit_message)

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> number, where the names are known."""
        return {name: number for number, name in enumerate(self._parts.class_names)}

    @property
    def num_classes(self) -> int:
        return self.config.data.num_classes

    @property
    def image_size(self) -> int:
        """Height and width of an image, in pixels."""
        return self.config.data.image_size

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products."""
        return torch.bfloat16 if self._precision in ("bf16", "fp8") else torch.float32

    def to(self, device: torch.device | torch.dtype | str | None = None, dtype: torch.dtype | str | None = None) -> "VAVAEPipeline":
        """Draw on `device` with matrix products in `dtype` from now on; as with modules, a dtype may stand alone. Returns itself."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        there = self._device if device is None else _device(device)
        precision = self.config.sample.precision if dtype is None else _PRECISIONS.get(dtype, dtype)
        require(precision in _WORDS, "dtype", dtype, f"torch.float32, torch.bfloat16, or one of {', '.join(_WORDS)}")
        if precision == "fp8":
            require_fp8(there, "dtype 'fp8'", "torch.bfloat16")
        self.config = replace(self.config, sample=replace(self.config.sample, precision=precision))
        self._device, self._running = there, None
        return self

    def __repr__(self) -> str:
        model, size = self.config.model.model_type, self.image_size
        return f"VAVAEPipeline({model}, {size} x {size}, {self.num_classes} classes, {self.device}, {str(self.dtype).removeprefix('torch.')})"

    # -- drawing ------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        labels: Labels | None = None,
        *,
        num_images_per_label: int = 1,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int | None = None,
        timestep_shift: float | None = None,
        sampler: str | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        progress: Callable[[int, int], None] | None = None,
        class_labels: Labels | None = None,
    ) -> VAVAEPipelineOutput | Any:  # Any: (images,), with return_dict=False
        """Images of the classes `labels` (or, as diffusers calls them, class_labels): numbers, or names of `.labels`.

        What is None is the model's default, `config.sample`. num_images_per_label: of each label, one after another.
        guidance_scale: 1 or less is none. guidance_interval: (start, end) in time, 0 is noise. num_inference_steps: times, as the
        reference counts, hence one step less. sampler: a name of `SAMPLERS`; "sde-…" are stochastic.
        Image i is a function of (seed, i) and the settings alone, whatever the batch. seed: drawn from `generator`, or from torch's
        own, when not given; the output names it. batch_size: images at once.
        output_type: "pil", a list; "np", (N, H, W, 3), or "pt", (N, 3, H, W), float32 in [0, 1] on the CPU; "latent", (N, C, h, w)
        float32 on `device`, as `decode` takes them. return_dict=False gives (images,). progress(done, total) after each batch.
        """
        kinds = (*OUTPUTS, "latent")
        require(output_type in kinds, "output_type", output_type, f"one of {', '.join(kinds)}")
        require(is_integer(num_images_per_label) and num_images_per_label > 0, "num_images_per_label", num_images_per_label, "an integer above 0")
        require((labels is None) != (class_labels is None), "labels", labels, "given, or class_labels, and not both")
        numbers = [n for n in self.get_label_ids(labels if class_labels is None else class_labels) for _ in range(num_images_per_label)]
        settings = self._settings(guidance_scale, guidance_interval, num_inference_steps, timestep_shift, sampler)
        size = self.config.sample.per_proc_batch_size if batch_size is None else batch_size
        require(is_integer(size) and size > 0, "batch_size", size, "an integer above 0")
        seed = _seed(seed, generator)
        run, c = self._run(), self.config
        latents = generate_latents(
            run.predict, torch.tensor(numbers, device=self.device), (c.model.in_chans, c.latent_size, c.latent_size), settings, seed=seed,
            null_label=self.num_classes, transport=self.transport, batch_size=size, whole_batches=self._compile != "none",
        )  # fmt: skip
        if output_type == "latent":
            batches = ((index, run.scale.denormalise(x)) for index, x in latents)
        else:
            batches = generate_images(latents, run.decode, run.scale)
        drawn, done = [], 0
        with self._arithmetic():
            for index, batch in batches:
                drawn.append(batch)
                done += len(index)
                if progress is not None:
                    progress(done, len(numbers))
        images = torch.cat(drawn) if output_type == "latent" else as_output(torch.cat(drawn), output_type)
        return VAVAEPipelineOutput(images, numbers, seed) if return_dict else (images,)

    def get_label_ids(self, labels: Labels) -> list[int]:
        """Numbers of classes that are given by number or by name; one alone is a list of one. `BadInput` for those that are none."""
        if isinstance(labels, Tensor | np.ndarray):
            labels = labels.reshape(-1).tolist()
        words = labels if isinstance(labels, Sequence) and not isinstance(labels, str) else [labels]
        require(len(words) > 0, "labels", labels, "one class or more")
        names = self.labels
        return [self._named(word, names) if isinstance(word, str) else self._numbered(word) for word in words]

    def _numbered(self, number: Any) -> int:
        known = is_integer(number) and 0 <= number < self.num_classes
        require(known, "labels", number, f"a class number from 0 to {self.num_classes - 1}" + (", or a name of .labels" if self.labels else ""))
        return int(number)

    def _named(self, name: str, names: dict[str, int]) -> int:
        if name in names:
            return names[name]
        if not names:
            raise BadInput(f"labels: {name!r} is a name, and this model's are not known; give numbers from 0 to {self.num_classes - 1}")
        close = difflib.get_close_matches(name, names, n=1)
        raise BadInput(f"labels: no class {name!r}" + (f"; did you mean {close[0]!r}?" if close else "; .labels holds all names"))

    def _settings(self, scale: Any, interval: Any, steps: Any, shift: Any, sampler: str | None) -> SamplerSettings:
        """The model's own, but for what is given."""
        ours: dict[str, Any] = {}
        if scale is not None:
            require(is_number(scale) and scale >= 0, "guidance_scale", scale, "a number, 0 or more (1 or less: no guidance)")
            require(scale <= 1 or self.config.model.class_dropout_prob > 0, "guidance_scale", scale, "1: this model has no null class")
            ours["cfg_scale"] = float(scale)
        if interval is not None:
            two = isinstance(interval, Sequence) and len(interval) == 2 and all(map(is_number, interval)) and 0 <= interval[0] <= interval[1] <= 1
            require(two, "guidance_interval", interval, "(start, end) with 0 <= start <= end <= 1")
            ours["cfg_interval_start"], ours["cfg_interval_end"] = map(float, interval)
        if steps is not None:
            require(is_integer(steps) and steps >= 2, "num_inference_steps", steps, "an integer, 2 or more (N times are N - 1 steps)")
            ours["num_sampling_steps"] = int(steps)
        if shift is not None:
            require(is_number(shift) and shift >= 0, "timestep_shift", shift, "a number, 0 (none) or more")
            ours["timestep_shift"] = float(shift)
        if sampler is not None:
            require(sampler in SAMPLERS, "sampler", sampler, f"one of {', '.join(SAMPLERS)}")
            ours["mode"], ours["sampling_method"] = SAMPLERS[sampler]
        return sampler_settings(replace(self.config.sample, **ours))

    # -- the tokenizer alone ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Any, seed: int | None = None) -> Tensor:
        """Images -> latents (N, C, h, w) float32 on `device`: the posterior's mean, or with a seed a draw of it.

        images: a PIL image or a list of them; an array (N, H, W, 3) or tensor (N, 3, H, W), uint8 or float in [0, 1]. All of one size,
        a multiple of the tokenizer's ratio.
        """
        with self._arithmetic():
            posterior = self._run().encode(as_input(images).to(self.device))
        if seed is None:
            return posterior.mode()
        index = torch.arange(len(posterior.mean), device=self.device)
        return posterior.sample(noise=rng.normal(_seed(seed, None), index, like=posterior.mean, stream=rng.Stream.POSTERIOR))

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Latents (N, C, h, w), not normalised, as `encode` and output_type "latent" give them -> images, as `output_type` says."""
        require(output_type in OUTPUTS, "output_type", output_type, f"one of {', '.join(OUTPUTS)}")
        require(isinstance(latents, Tensor) and latents.ndim == 4 and len(latents) > 0, "latents", type(latents).__name__, "a tensor (N, C, h, w)")
        decode = self._run().decode
        with self._arithmetic():
            return as_output(torch.cat([to_uint8(decode(z)).cpu() for z in latents.to(self.device).split(_DECODED)]), output_type)

    # -- what runs ----------------------------------------------------------------------------------------------------

    @property
    def _precision(self) -> str:
        asked = self.config.sample.precision
        return ("bf16" if build.bf16(asked, self.device) else "fp32") if asked == "auto" else asked

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Inside, this device is the current one (graphs are captured on it), and products have the precision asked for."""
        here = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with here, matmul_precision(self._precision):
            yield

    def _run(self) -> "_Running":
        if self._running is None:
            self._running = _Running.of(self._parts, self.config.sample, self.device, self._precision, self._compile)
        return self._running


@dataclass(frozen=True)
class _Running:
    """What a device computes: predict(x, t, y), decode(z), encode(images), and the normalisation to be undone between them."""

    predict: Callable[[Tensor, Tensor, Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], DiagonalGaussian]
    scale: LatentScale

    @staticmethod
    def of(parts: Parts, sample: SampleConfig, device: torch.device, precision: str, compile: str) -> "_Running":
        """From copies of the networks, for these are moved, rounded and compiled; on a CPU in float32 nothing is done to them."""
        as_loaded = device.type == "cpu" and precision not in ("bf16", "fp8") and compile == "none"
        model, tokenizer = (parts.lightningdit, parts.tokenizer) if as_loaded else copy.deepcopy((parts.lightningdit, parts.tokenizer))
        predict = predictor(model, device, precision, compile, sample.cuda_graphs)
        decode = decoder(tokenizer, device, precision)
        mean, std = parts.mean.to(device), parts.std.to(device)

        def encode(images: Tensor) -> DiagonalGaussian:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision in ("bf16", "fp8"), cache_enabled=False):
                return tokenizer.encode(images)

        return _Running(predict, decode, encode, LatentScale(mean, std, parts.config.data.latent_multiplier))


def _device(given: torch.device | str | None) -> torch.device:
    """The one given, or the GPU where there is one."""
    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(given)
    except RuntimeError:
        raise BadInput(f"device: {given!r} is none; give 'cuda', 'cuda:1' or 'cpu'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"device: {given} is not there, this machine has no CUDA GPU; give 'cpu'")
    return device


def _seed(seed: int | None, generator: torch.Generator | None) -> int:
    """The seed given, or one drawn from the generator (torch's own where that is None)."""
    if seed is not None:
        require(generator is None, "seed", seed, "left out where there is a generator")
        require(is_integer(seed) and 0 <= seed <= _MAX_SEED, "seed", seed, f"an integer from 0 to {_MAX_SEED}")
        return int(seed)
    single = generator is None or isinstance(generator, torch.Generator)
    require(single, "generator", type(generator).__name__, "one torch.Generator (image i is a function of (seed, i), a list is not needed)")
    return int(torch.randint(_MAX_SEED, (1,), generator=generator, device=generator.device if generator else "cpu"))


def _read_metrics(metrics: Sequence[Metrics] | Metrics) -> list[Mapping[str, Any]]:
    each = [metrics] if isinstance(metrics, Mapping | str | Path) else metrics
    return [m if isinstance(m, Mapping) else artifacts.read_json(Path(m)) for m in each]
