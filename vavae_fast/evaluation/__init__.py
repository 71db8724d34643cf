"""Scores of images and latents: functions over arrays or tensors, usable without the rest of the package.

Imported here at once, not when first asked for: three functions share the name of their file, and the file would win.
Nothing heavy comes along; SciPy and scikit-learn are imported by `uniformity` when it runs.
"""

from vavae_fast.evaluation.evaluate import METRICS, evaluate_samples, of_images, require_count, require_metrics
from vavae_fast.evaluation.features import FeatureStatistics, feature_statistics
from vavae_fast.evaluation.frechet import frechet_distance
from vavae_fast.evaluation.inception import Inception, load_inception
from vavae_fast.evaluation.inception_score import inception_score
from vavae_fast.evaluation.judge import Agreement, RBFClassifier, class_agreement, nearest_distances, pixel_frechet, spread
from vavae_fast.evaluation.precision_recall import precision_recall
from vavae_fast.evaluation.reconstruction import psnr, ssim
from vavae_fast.evaluation.reference import NpzImages, ReferenceStatistics, load_reference, read_samples, save_reference
from vavae_fast.evaluation.similarity import similarity_map
from vavae_fast.evaluation.uniformity import neighbour_distance_cv, uniformity

__all__ = [
    "METRICS",
    "Agreement",
    "FeatureStatistics",
    "Inception",
    "NpzImages",
    "RBFClassifier",
    "ReferenceStatistics",
    "class_agreement",
    "evaluate_samples",
    "feature_statistics",
    "frechet_distance",
    "inception_score",
    "load_inception",
    "load_reference",
    "nearest_distances",
    "neighbour_distance_cv",
    "of_images",
    "pixel_frechet",
    "precision_recall",
    "psnr",
    "read_samples",
    "require_count",
    "require_metrics",
    "save_reference",
    "similarity_map",
    "spread",
    "ssim",
    "uniformity",
]
