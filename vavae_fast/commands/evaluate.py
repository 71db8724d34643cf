"""Score samples against a reference by ADM's metrics, or a tokenizer by how well it reconstructs images."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.config import LightningDiTConfig, load_config
from vavae_fast.errors import BadInput, require

EXAMPLE = "vavae-fast evaluate --samples samples/samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception pt_inception.pth --json fid.json"

SAMPLE_METRICS = ("fid", "sfid", "is", "precision", "recall")
RECONSTRUCTION_METRICS = ("rfid", "psnr", "ssim", "lpips")


def arguments(parser) -> None:
    parser.add_argument("--samples", metavar="S", help="image folder, or .npz with arr_0")
    parser.add_argument("--reference", metavar="R", help="image folder, .npz with arr_0, or statistics .npz (mu sigma mu_s sigma_s)")
    parser.add_argument("--metrics", help=f"of {','.join(SAMPLE_METRICS)}; with --reconstruction of {','.join(RECONSTRUCTION_METRICS)}; default: all")
    parser.add_argument("--inception", metavar="FILE", help="weights of the FID Inception network (pt_inception-2015-12-05-6726825d.pth)")
    parser.add_argument("--bootstrap", type=int, default=0, metavar="N", help="resamples for a standard error of FID")
    parser.add_argument("--reconstruction", action="store_true", help="score a tokenizer: needs --config and --images")
    parser.add_argument("--config", metavar="FILE", help="with --reconstruction: config of either kind")
    parser.add_argument("--images", metavar="DIR", help="with --reconstruction: images")
    parser.add_argument("--checkpoint", metavar="CKPT", help="with --reconstruction: tokenizer weights; default: the config's")
    parser.add_argument("--vgg", metavar="FILE", help="with --reconstruction: VGG16 weights for LPIPS")
    parser.add_argument("--lpips", metavar="FILE", help="with --reconstruction: LPIPS v0.1 linear weights for VGG")
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
    inception: Any
    bootstrap: int
    json: Path | None

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
    batch: int
    json: Path | None
    facts: dict[str, Any]

    def describe(self) -> str:
        return f"{', '.join(self.metrics)} of {len(self.images):,} images, {self.facts}\nnothing was written"


def plan(config: None, args) -> "EvaluatePlan | ReconstructionPlan":
    """Inputs first, then the weights of Inception."""
    known = RECONSTRUCTION_METRICS if args.reconstruction else SAMPLE_METRICS
    metrics = args.metrics.split(",") if args.metrics else list(known)
    for name in metrics:
        require(name in known, "--metrics", name, f"among {', '.join(known)}")
    require(args.batch > 0, "--batch", args.batch, "above 0")
    require(args.bootstrap == 0 or args.bootstrap >= 2, "--bootstrap", args.bootstrap, "0, or 2 or more")
    if args.json:
        artifacts.require_writable(args.json.parent)
    return _plan_reconstruction(args, metrics) if args.reconstruction else _plan_samples(args, metrics)


def _plan_samples(args, metrics: list[str]) -> EvaluatePlan:
    for flag, value in (("--samples", args.samples), ("--reference", args.reference)):
        if not value:
            raise BadInput(f"{flag}: missing; give an image folder or an .npz file")
    for flag in ("config", "images", "checkpoint"):
        if getattr(args, flag):
            raise BadInput(f"--{flag}: only with --reconstruction")
    from vavae_fast.evaluation import NpzImages, ReferenceStatistics, load_reference, require_count, require_metrics

    size = args.image_size or _npz_size(args.samples) or _npz_size(args.reference) or 256
    samples = NpzImages(args.samples, args.batch) if _is_npz(args.samples) else _folder(args.samples, size, args.batch)
    if _is_npz(args.reference):
        reference = load_reference(args.reference, args.batch)
    else:
        reference = ReferenceStatistics(str(args.reference), images=_folder(args.reference, size, args.batch))
    require_metrics(metrics, reference)
    require_count(len(samples), metrics)
    return EvaluatePlan(metrics, samples, reference, _inception(args.inception), args.bootstrap, args.json)


def _is_npz(path: str) -> bool:
    if not Path(path).exists() and not path.startswith("builtin:"):
        raise BadInput(f"{path}: no such file or folder")
    return path.endswith(".npz")


def _npz_size(path: str) -> int | None:
    from vavae_fast.evaluation import load_reference

    if not _is_npz(path):
        return None
    images = load_reference(path).images
    return None if images is None else images.shape[1]


class _Folder:
    """The images of a folder as uint8 batches, again and again."""

    def __init__(self, path: str, images: Any, batch: int):
        self.path, self.images, self.batch = path, images, batch

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Any]:
        return (batch.pixels for batch in self.images.batches(self.batch))

    def __repr__(self) -> str:
        return f"{len(self)} images in {self.path}"


def _folder(path: str, size: int, batch: int) -> _Folder:
    from vavae_fast.commands import build

    return _Folder(path, build.images(path, size), batch)


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
    config = load_config(args.config, tuple(args.overrides))
    from vavae_fast.commands import build
    from vavae_fast.evaluation import require_count
    from vavae_fast.models import LPIPS

    size = args.image_size or (config.data.image_size if isinstance(config, LightningDiTConfig) else config.image_size)
    images = build.images(args.images, size)
    tokenizer = build.tokenizer(config, args.checkpoint)
    if "rfid" in metrics:
        require_count(len(images), ["fid"], str(args.images))
    inception = _inception(args.inception) if "rfid" in metrics else None
    lpips = LPIPS.from_files(args.vgg, args.lpips) if "lpips" in metrics else None
    own = config.vae.ckpt_path if isinstance(config, LightningDiTConfig) else config.ckpt_path
    facts = dict(protocol="adm: ADM crop, posterior mean, uint8 before scoring; LPIPS on [-1, 1]", images=str(args.images), count=len(images),
                 image_size=size, tokenizer=str(args.checkpoint or own))  # fmt: skip
    return ReconstructionPlan(metrics, tokenizer, images, inception, lpips, args.batch, args.json, facts)


def run(plan: "EvaluatePlan | ReconstructionPlan") -> dict[str, Any]:
    """Score, print a table, write the JSON."""
    if isinstance(plan, EvaluatePlan):
        from vavae_fast.evaluation import evaluate_samples

        result = evaluate_samples(plan.samples, plan.reference, plan.metrics, plan.inception, plan.bootstrap)
    else:
        result = reconstruction_scores(plan)
    _print_table(result)
    if plan.json:
        # JSON has no word for infinity, which is the PSNR of equal images.
        written = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in result.items()}
        artifacts.write_json(plan.json, artifacts.manifest("metrics", **written))
    return result


def reconstruction_scores(plan: ReconstructionPlan) -> dict[str, Any]:
    """rFID, PSNR (dB), SSIM, LPIPS: means over the images, by the plan's protocol."""
    import torch

    from vavae_fast.evaluation import ReferenceStatistics, evaluate_samples, psnr, ssim
    from vavae_fast.pixels import to_uint8, to_unit

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = plan.tokenizer.to(device)
    sums: dict[str, float] = {}

    @torch.inference_mode()
    def reconstructions() -> Iterator[Any]:
        for batch in plan.images.batches(plan.batch):
            images = to_unit(batch.pixels.to(device))
            decoded = tokenizer.decode(tokenizer.encode(images).mode())
            pixels = to_uint8(decoded)
            scores = {}
            if "psnr" in plan.metrics:
                scores["psnr"] = psnr(pixels, batch.pixels.to(device))
            if "ssim" in plan.metrics:
                scores["ssim"] = ssim(pixels, batch.pixels.to(device))
            if "lpips" in plan.metrics:
                scores["lpips"] = plan.lpips.to(device)(images, decoded)
            for name, values in scores.items():
                sums[name] = sums.get(name, 0.0) + float(values.double().sum())
            yield pixels

    result: dict[str, Any] = {}
    if "rfid" in plan.metrics:
        originals = ReferenceStatistics("originals", images=_Folder(plan.facts["images"], plan.images, plan.batch))
        scored = evaluate_samples(reconstructions(), originals, ["fid"], plan.inception)
        result["rfid"] = scored["fid"]
        plan.facts["inception_sha256"] = scored["protocol"]["inception_sha256"]
    else:
        for _ in reconstructions():
            pass
    result |= {name: total / len(plan.images) for name, total in sums.items()}
    return result | {"protocol": plan.facts}


def _print_table(result: dict[str, Any]) -> None:
    protocol = result.get("protocol", {})
    for name, value in result.items():
        if name != "protocol":
            label = protocol.get("fid_name", name.upper()) if name == "fid" else name
            print(f"{label:<20} {value:.4f}")
    for warning in protocol.get("warnings", ()):
        print(f"note: {warning}")
