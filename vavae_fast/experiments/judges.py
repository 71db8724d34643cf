"""What scores an arm: of digits their pixels, of other images a small classifier trained here, or Inception where its weights are given."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.experiments.standins import Classifier, Images
from vavae_fast.experiments.work import Lab, Work


@dataclass(frozen=True)
class Score:
    """One column of a table."""

    key: str
    title: str
    more_is_better: bool
    factor: float = 1.0  # from the stored value to the shown one
    digits: int = 1


PSNR = Score("psnr", "PSNR, dB", True, digits=2)


@dataclass(frozen=True)
class DigitsJudge:
    """Fréchet distance of pixel Gaussians, to all real digits; class agreement by a kernel classifier fitted on the training digits."""

    reconstruction = (PSNR, Score("rfrechet", "reconstruction Fréchet, of pixels", False))
    generation = (Score("frechet", "Fréchet, of pixels", False), Score("agreement", "in the requested class, %", True, 100))
    says = "digits at 8 x 8, values 0 to 16: Fréchet distance of pixel Gaussians, class agreement by an RBF kernel classifier"

    def needs(self) -> tuple[Work, ...]:
        return ()

    def facts(self) -> dict[str, Any]:
        return dict(judge="digits")

    def reconstructions(self, lab: Lab, run: Path, images: Images) -> dict[str, float]:
        """Of the held-out digits, from the posterior's mean."""
        import torch

        from vavae_fast.data import digits_from_images
        from vavae_fast.evaluation import pixel_frechet, psnr

        pixels, made = (torch.cat(part) for part in zip(*_reconstructed(run, images)))
        ours, theirs = (digits_from_images(x, rounded=True) for x in (made, pixels))
        return dict(psnr=float(psnr(made, pixels).mean()), rfrechet=pixel_frechet(ours, theirs))

    def generations(self, lab: Lab, samples: Path, labelled: bool) -> dict[str, float]:
        import torch

        from vavae_fast.commands.demo_judge import read_samples
        from vavae_fast.data import digits, digits_from_images
        from vavae_fast.evaluation import RBFClassifier, class_agreement, pixel_frechet, spread

        (train, train_labels), (real, real_labels) = (
            (torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y)) for x, y in (digits("train"), digits("all"))
        )
        images, labels = read_samples(samples)
        ours = digits_from_images(images, rounded=True)
        classifier, frechet = RBFClassifier().fit(train, train_labels), pixel_frechet(ours, real)
        if not labelled:
            return dict(frechet=frechet, balance=_balance(torch.as_tensor(classifier.predict(ours))))
        agreement = class_agreement(ours, labels, classifier)
        return dict(frechet=frechet, agreement=agreement.overall, worst=agreement.worst, spread=spread(ours, labels, real, real_labels))


@dataclass(frozen=True)
class FeatureJudge:
    """Fréchet distance in the last features of a small classifier, trained here with another seed than the perceptual network's."""

    classifier: Classifier
    images: Images

    reconstruction = (
        PSNR, Score("ssim", "SSIM", True, digits=3), Score("rfrechet", "reconstruction Fréchet, of classifier features", False, digits=3),
    )  # fmt: skip
    generation = (
        Score("frechet", "Fréchet, of classifier features", False, digits=3), Score("agreement", "in the requested class, %", True, 100),
    )  # fmt: skip
    says = "Fréchet distance in the features of a small classifier trained on the same images; class agreement by that classifier"

    def needs(self) -> tuple[Work, ...]:
        return (self.classifier,)

    def facts(self) -> dict[str, Any]:
        return dict(judge="classifier", reference=self.images.train, valid=self.images.valid)

    def reconstructions(self, lab: Lab, run: Path, images: Images) -> dict[str, float]:
        from vavae_fast.evaluation import FeatureStatistics, frechet_distance, psnr, ssim

        network, sums, count = self._network(lab), [0.0, 0.0], 0
        ours, theirs = FeatureStatistics(), FeatureStatistics()
        for pixels, made in _reconstructed(run, images):
            sums = [total + float(of(made, pixels).sum()) for total, of in zip(sums, (psnr, ssim))]
            count += len(pixels)
            ours.update(network(made)[0])
            theirs.update(network(pixels)[0])
        distance = frechet_distance(*ours.result(), *theirs.result())
        return dict(psnr=sums[0] / count, ssim=sums[1] / count, rfrechet=distance)

    def generations(self, lab: Lab, samples: Path, labelled: bool) -> dict[str, float]:
        import torch

        from vavae_fast.commands.demo_judge import read_samples
        from vavae_fast.data import open_images
        from vavae_fast.evaluation import FeatureStatistics, frechet_distance

        network, (drawn, labels) = self._network(lab), read_samples(samples)
        ours, theirs, predicted = FeatureStatistics(), FeatureStatistics(), []
        for part in drawn.split(_BATCH):
            features, logits = network(part)
            ours.update(features)
            predicted.append(logits.argmax(dim=1).cpu())
        for batch in open_images(self.images.train, size=self.images.size).batches(_BATCH):
            theirs.update(network(batch.pixels)[0])
        distance, predicted = frechet_distance(*ours.result(), *theirs.result()), torch.cat(predicted)
        if not labelled:
            return dict(frechet=distance, balance=_balance(predicted))
        return dict(frechet=distance, agreement=float((predicted == labels).double().mean()))

    def _network(self, lab: Lab):
        """uint8 (n, 3, H, W) -> features (n, D), logits (n, classes)."""
        import torch

        from vavae_fast.experiments.standins import best_device
        from vavae_fast.models.standins import load_standin
        from vavae_fast.pixels import to_unit

        device = best_device()
        network = load_standin(self.classifier.file(lab)).to(device)

        @torch.inference_mode()
        def seen(pixels):
            features = network.features(to_unit(pixels.to(device)))[-1].mean(dim=(2, 3))
            return features, network.head(features)

        return seen


@dataclass(frozen=True)
class InceptionJudge:
    """The paper's metrics, by `evaluate`: ADM's protocol, reconstructions by the reference's own."""

    inception: str
    reference: str
    config: Path  # of the tokenizer, for its image size
    vgg: str | None = None
    lpips: str | None = None

    reconstruction = (
        Score("rfrechet", "rFID", False, digits=3), PSNR, Score("lpips", "LPIPS", False, digits=3), Score("ssim", "SSIM", True, digits=3),
    )  # fmt: skip
    generation = (Score("frechet", "FID", False, digits=2), Score("is", "inception score", True))
    says = "Inception's features, as ADM evaluates; reconstructions by the protocol of the reference's evaluate_tokenizer.py"

    def needs(self) -> tuple[Work, ...]:
        return ()

    def facts(self) -> dict[str, Any]:
        return dict(judge="inception", inception=self.inception, reference=self.reference, lpips=self.lpips)

    def reconstructions(self, lab: Lab, run: Path, images: Images) -> dict[str, float]:
        path, with_lpips = run.parent / "reconstruction.json", self.vgg is not None and self.lpips is not None
        words = ["--vgg", self.vgg, "--lpips", self.lpips] if with_lpips else []
        metrics = "rfid,psnr,ssim,lpips" if with_lpips else "rfid,psnr,ssim"
        lab.run("evaluate", "--reconstruction", "--config", run / "config.yaml", "--checkpoint", run, "--images", images.valid, "--metrics", metrics,
                "--protocol", "lightningdit", "--inception", self.inception, *words, "--json", path)  # fmt: skip
        found = artifacts.read_json(path)
        return {name.replace("rfid", "rfrechet"): found[name] for name in metrics.split(",")}

    def generations(self, lab: Lab, samples: Path, labelled: bool) -> dict[str, float]:
        path = samples / "metrics.json"
        names = dict(fid="frechet", sfid="sfid", precision="precision", recall="recall") | {"is": "is"}
        if not path.is_file():
            lab_of_one = Lab(lab.out)  # evaluate scores samples in one process
            lab_of_one.run("evaluate", "--samples", samples / "samples.npz", "--reference", self.reference, "--metrics", ",".join(names),
                           "--inception", self.inception, "--json", path)  # fmt: skip
        found = artifacts.read_json(path)
        return {ours: found[theirs] for theirs, ours in names.items()}


Judge = DigitsJudge | FeatureJudge | InceptionJudge
_BATCH = 256


def _reconstructed(run: Path, images: Images):
    """(pixels, reconstruction from the posterior's mean) of the held-out images, uint8 (n, 3, H, W) each."""
    import torch

    from vavae_fast.commands import build
    from vavae_fast.data import open_images
    from vavae_fast.experiments.standins import best_device
    from vavae_fast.pixels import to_uint8, to_unit

    device = best_device()
    tokenizer = build.tokenizer_alone(run).to(device)
    for batch in open_images(images.valid, size=images.size).batches(_BATCH):
        with torch.inference_mode():
            made = to_uint8(tokenizer.decode(tokenizer.encode(to_unit(batch.pixels.to(device))).mode()))
        yield batch.pixels, made.cpu()


def _balance(predicted) -> float:
    """Entropy of the predicted classes (N,) over its largest value, for ten classes and more: 1 where all come equally often."""
    import torch

    share = torch.bincount(predicted).double() / len(predicted)
    share = share[share > 0]
    return float((share * (1 / share).log()).sum() / torch.tensor(10.0).log())
