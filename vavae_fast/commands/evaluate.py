"""Score samples against a reference by ADM's metrics, or a tokenizer by how well it reconstructs images."""

import json
import math
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.commands.scored_images import FolderImages, in_one_line, is_npz, made_by, npz_size, open_scored
from vavae_fast.config import LightningDiTConfig, given_path, load_config, world_size
from vavae_fast.errors import BadInput, printable, require

EXAMPLE = "vavae-fast evaluate --samples samples/samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception pt_inception.pth --json fid.json"

SAMPLE_METRICS = ("fid", "sfid", "is", "precision", "recall", "fd")
RECONSTRUCTION_METRICS = ("rfid", "psnr", "ssim", "lpips")
RECONSTRUCTION_PROTOCOLS = ("adm", "lightningdit")
_RECONSTRUCTION_FLAGS = ("config", "images", "checkpoint", "vgg", "lpips", "protocol", "seed", "precision", "picture", "picture_num")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--samples", metavar="S", help="image folder, .npz with arr_0, or latent shards (with --tokenizer)")
    parser.add_argument("--reference", metavar="R", help="image folder, .npz with arr_0, or statistics .npz (mu sigma mu_s sigma_s)")
    parser.add_argument("--metrics", help=f"of {','.join(SAMPLE_METRICS)}; with --reconstruction of {','.join(RECONSTRUCTION_METRICS)}; default: all")
    parser.add_argument("--inception", metavar="FILE", help="weights of the FID Inception network (pt_inception-2015-12-05-6726825d.pth)")
    parser.add_argument("--features", metavar="NAME", help="for fd, a Fréchet distance elsewhere: of a foundation model, as dinov2, or timm:NAME")
    parser.add_argument("--features-weights", metavar="FILE", help="its weights, or hub to let timm download them")
    parser.add_argument("--tokenizer", metavar="CKPT", help="decodes --samples that are latent shards")
    parser.add_argument("--bootstrap", type=int, default=0, metavar="N", help="resamples for a standard error of every value")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two files of --json: values, and what made them differ")
    parser.add_argument("--reconstruction", action="store_true", help="score a tokenizer: needs --config and --images")
    parser.add_argument("--config", metavar="FILE", help="with --reconstruction: config of either kind")
    parser.add_argument("--images", metavar="DIR", help="with --reconstruction: images")
    parser.add_argument("--checkpoint", metavar="CKPT", help="with --reconstruction: tokenizer weights; default: the config's")
    parser.add_argument("--vgg", metavar="FILE", help="with --reconstruction: VGG16 weights for LPIPS")
    parser.add_argument("--lpips", metavar="FILE", help="with --reconstruction: LPIPS v0.1 linear weights for VGG")
    parser.add_argument("--protocol", choices=RECONSTRUCTION_PROTOCOLS, help="with --reconstruction: crop, latent and arithmetic; default: adm")
    parser.add_argument("--seed", type=int, help="with --reconstruction: of the posterior's noise, where the protocol samples; default: 0")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), help="with --reconstruction: of the tokenizer; default: fp32")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="with --reconstruction: a PNG of originals, reconstructions, differences")
    parser.add_argument("--picture-num", type=int, metavar="N", help="images of the picture; default: 8")
    parser.add_argument("--batch", type=int, default=32, help="images at a time (default 32)")
    parser.add_argument("--image-size", type=int, help="of image folders; default: that of the .npz beside, or 256")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="with --config: override config keys")


@dataclass(frozen=True)
class EvaluatePlan:
    """What is compared with what."""

    metrics: list[str]
    samples: Any
    reference: Any
    inception: Any  # None where only fd is asked for
    embedding: Any  # None without fd
    bootstrap: int
    batch: int
    json: Path | None
    made_by: dict[str, Any]  # what the samples' manifest says

    def describe(self) -> str:
        return f"{', '.join(self.metrics)} of {self.samples!r} against {self.reference.name}\nnothing was written"


@dataclass(frozen=True)
class ReconstructionPlan:
    """Which tokenizer sees which images."""

    metrics: list[str]
    tokenizer: Any
    images: Any
    inception: Any
    lpips: Any
    protocol: str
    seed: int
    precision: str
    batch: int
    picture: Path | None
    picture_num: int
    json: Path | None
    facts: dict[str, Any] = field(default_factory=dict)  # what made the values, for the JSON

    def describe(self) -> str:
        facts = "".join(f"{name:<18} {value}\n" for name, value in self.facts.items())
        return f"{', '.join(self.metrics)} of {len(self.images):,} images\n{facts}nothing was written"


@dataclass(frozen=True)
class ComparePlan:
    """Two files of metrics."""

    text: str

    def describe(self) -> str:
        return f"{self.text}\nnothing was written"


def plan(config: None, args: Namespace) -> "EvaluatePlan | ReconstructionPlan | ComparePlan":
    """Inputs first, then the weights of Inception."""
    if args.compare:
        from vavae_fast.commands import compare_scores

        return ComparePlan(compare_scores.describe(*args.compare))
    known = RECONSTRUCTION_METRICS if args.reconstruction else SAMPLE_METRICS
    metrics = args.metrics.split(",") if args.metrics else [name for name in known if name != "fd" or args.features]
    for name in metrics:
        require(name in known, "--metrics", name, f"among {', '.join(known)}")
    require(args.batch > 0, "--batch", args.batch, "above 0")
    require(args.bootstrap == 0 or args.bootstrap >= 2, "--bootstrap", args.bootstrap, "0, or 2 or more")
    for file in (args.json, args.picture):
        if file:
            artifacts.require_writable(file.parent)
    return _plan_reconstruction(args, metrics) if args.reconstruction else _plan_samples(args, metrics)


def _plan_samples(args, metrics: list[str]) -> EvaluatePlan:
    for flag, value in (("--samples", args.samples), ("--reference", args.reference)):
        if not value:
            raise BadInput(f"{flag}: missing; give an image folder or an .npz file")
    for name in _RECONSTRUCTION_FLAGS:
        if getattr(args, name) is not None:
            raise BadInput(f"--{name.replace('_', '-')}: only with --reconstruction")
    if args.overrides:
        raise BadInput(f"{args.overrides[0]}: only with --reconstruction, whose config it overrides")
    for name, value in (("--features", args.features), ("--features-weights", args.features_weights)):
        if value is not None and "fd" not in metrics:
            raise BadInput(f"{name}: only for fd; add it to --metrics, or leave {name} out")
    require(world_size() == 1, "--samples", f"{world_size()} processes", "scored by one; start evaluate without torchrun")
    from vavae_fast.evaluation import ReferenceStatistics, load_reference, of_images, require_count, require_metrics

    size = args.image_size or npz_size(args.samples) or npz_size(args.reference) or 256
    samples = open_scored(args.samples, size, args.batch, args.tokenizer)
    if is_npz(args.reference):
        reference = load_reference(args.reference, args.batch)
    else:
        reference = ReferenceStatistics(str(args.reference), images=FolderImages(args.reference, size, args.batch))
    embedding = _embedding(args) if "fd" in metrics else None
    require_metrics(metrics, reference, embedding is not None)
    require_count(len(samples), metrics)
    if needed := of_images(metrics, reference):
        require_count(len(reference.images), needed, reference.name)
    inception = _inception(args.inception) if set(metrics) - {"fd"} else None
    return EvaluatePlan(metrics, samples, reference, inception, embedding, args.bootstrap, args.batch, args.json, made_by(args.samples, samples))


def _embedding(args: Namespace) -> Any:
    if not args.features:
        raise BadInput("--features: missing; fd is a distance between features of a model that you name, as dinov2")
    if args.features_weights != "hub":
        given_path(args.features_weights, "--features-weights", f"the weights of {args.features}, or hub to let timm download them")
    import torch

    from vavae_fast.models.image_features import ImageFeatures

    return ImageFeatures(args.features, args.features_weights).to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _inception(path: str | None) -> Any:
    import torch

    from vavae_fast.evaluation import load_inception

    return load_inception(path, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _plan_reconstruction(args, metrics: list[str]) -> ReconstructionPlan:
    for flag, value in (("--config", args.config), ("--images", args.images)):
        if not value:
            raise BadInput(f"{flag}: needed with --reconstruction")
    for flag, value, what in (("--vgg", args.vgg, "VGG16 weights (vgg16-397923af.pth)"), ("--lpips", args.lpips, "linear weights (vgg.pth)")):
        if "lpips" in metrics and not value:
            raise BadInput(f"{flag}: missing; LPIPS needs its {what}; give the file, or leave lpips out of --metrics")
    unused = ("samples", "reference", "bootstrap", "tokenizer", "features", "features_weights")
    for flag, value in ((f"--{name.replace('_', '-')}", getattr(args, name)) for name in unused):
        if value:
            raise BadInput(f"{flag}: only without --reconstruction")
    seed, number = args.seed or 0, 8 if args.picture_num is None else args.picture_num
    require(seed >= 0, "--seed", seed, "0 or more")
    require(number > 0, "--picture-num", number, "above 0")
    config = load_config(args.config, tuple(args.overrides))
    from vavae_fast.commands import build
    from vavae_fast.commands.reconstruction import PROTOCOLS
    from vavae_fast.evaluation import load_inception, require_count
    from vavae_fast.models import LPIPS

    name, precision = args.protocol or "adm", args.precision or "fp32"
    size = args.image_size or (config.data.image_size if isinstance(config, LightningDiTConfig) else config.image_size)
    images = build.images(args.images, size, PROTOCOLS[name].crop)
    tokenizer = build.tokenizer(config, args.checkpoint)
    require(size % tokenizer.downsample_ratio == 0, "--image-size", size, f"a multiple of {tokenizer.downsample_ratio}, the tokenizer's ratio")
    if "rfid" in metrics:
        require_count(len(images), ["fid"], str(args.images))
    inception = load_inception(args.inception) if "rfid" in metrics else None
    lpips = LPIPS.from_files(args.vgg, args.lpips) if "lpips" in metrics else None
    own = config.vae.ckpt_path if isinstance(config, LightningDiTConfig) else config.ckpt_path
    facts = dict(name=name, protocol=PROTOCOLS[name].says, images=str(args.images), count=len(images), fingerprint=images.fingerprint(),
                 image_size=size, tokenizer=str(args.checkpoint or own), tokenizer_sha256=build.weights_digest(tokenizer), seed=seed,
                 precision=precision, batch=args.batch) | _identity(args, inception, lpips)  # fmt: skip
    return ReconstructionPlan(metrics, tokenizer, images, inception, lpips, name, seed, precision, args.batch, args.picture, number, args.json, facts)


def _identity(args, inception: Any, lpips: Any) -> dict[str, Any]:
    """Which weights judge."""
    facts: dict[str, Any] = {}
    if inception is not None:
        facts["inception_sha256"] = inception.sha256
        if not inception.recognised:
            facts["warnings"] = ["Inception weights are not the known ones; values compare only with others of the same weights"]
    if lpips is not None:
        facts |= dict(vgg_sha256=artifacts.sha256(Path(args.vgg)), lpips_sha256=artifacts.sha256(Path(args.lpips)))
    return facts


def run(plan: "EvaluatePlan | ReconstructionPlan | ComparePlan") -> dict[str, Any] | None:
    """Score, print a table, write the JSON; of several processes the main one, and the others return None."""
    if isinstance(plan, ComparePlan):
        print(printable(plan.text))
        return None
    if isinstance(plan, EvaluatePlan):
        from vavae_fast.evaluation import evaluate_samples

        with in_one_line(repr(plan.samples)):
            result = evaluate_samples(plan.samples, plan.reference, plan.metrics, plan.inception, plan.bootstrap, embedding=plan.embedding)
        result["protocol"]["batch"] = plan.batch
        result |= {"made_by": plan.made_by} if plan.made_by else {}
    else:
        result = _reconstruct(plan)
    if result is None:
        return None
    _print_table(result)
    if plan.json:
        # JSON has no word for infinity, which is the PSNR of equal images.
        written = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in result.items()}
        artifacts.write_json(plan.json, artifacts.manifest("metrics", **written))
    return result


def _reconstruct(plan: ReconstructionPlan) -> dict[str, Any] | None:
    """Values by name, and the protocol that made them."""
    from vavae_fast.commands import build
    from vavae_fast.commands.reconstruction import PROTOCOLS, Judges, Reconstructor, TallyFile, reconstruction_scores, write_picture
    from vavae_fast.distributed import open_world
    from vavae_fast.evaluation.evaluate import fid_name

    with open_world() as world:
        networks = [network if network is None else network.to(world.device) for network in (plan.tokenizer, plan.inception, plan.lpips)]
        bf16 = build.bf16(plan.precision, world.device)
        reconstructor = Reconstructor(networks[0], plan.images, PROTOCOLS[plan.protocol], plan.seed, bf16, world)
        held = None if plan.json is None else TallyFile(plan.json.with_name(f"{plan.json.name}.part{world.rank}"), _tally_identity(plan, world.size))
        with in_one_line(plan.facts["images"]):
            scores = reconstruction_scores(reconstructor, Judges(*networks[1:]), plan.metrics, plan.batch, held)
        if held is not None:
            held.remove()
        if scores is None:
            return None
        if plan.picture:
            print(f"picture  {write_picture(plan.picture, reconstructor, plan.picture_num, plan.batch)}")
        facts = plan.facts | dict(fid_name=f"r{fid_name(len(plan.images))}", processes=world.size, device=str(world.device))
        return scores | {"protocol": facts}


def _tally_identity(plan: ReconstructionPlan, processes: int) -> str:
    """Of what a process's tally is a part: changes with everything that a value depends on."""
    return json.dumps(plan.facts | dict(metrics=plan.metrics, processes=processes), sort_keys=True)


def _print_table(result: dict[str, Any]) -> None:
    protocol = result.get("protocol", {})
    for name, value in result.items():
        if name not in ("protocol", "made_by") and not name.endswith("_standard_error"):
            label = protocol.get("fid_name", name.upper()) if name in ("fid", "rfid") else name
            error = result.get(f"{name}_standard_error")
            print(f"{label:<20} {value:.4f}" + ("" if error is None else f"  ± {1.96 * error:.4f} (95 %)"))
    for warning in protocol.get("warnings", ()):
        print(f"note: {warning}")
