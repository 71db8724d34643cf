"""Inception score (Salimans et al. 2016): exp of the mean KL(p(y|x) || p(y)), with the splits of ADM's evaluator."""

import math

import torch
from torch import Tensor

from vavae_fast.evaluation.inputs import Array, finite_tensor, integer


def inception_score(logits: Array, split_size: int = 5000) -> float:
    """Mean score over splits of `split_size` rows of `logits` (N, classes), in file order; a short last split counts as one.

    Between 1 and the number of classes. `ValueError`: NaN or infinity, split_size not an integer from 1 on.
    """
    rows = finite_tensor(logits, "logits", "N, classes")
    scores = [_score(part.to(torch.float64)) for part in rows.split(integer(split_size, "split_size", 1))]
    return torch.stack(scores).mean().item()


def _score(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(dim=1)
    log_marginal = log_p.logsumexp(dim=0) - math.log(len(log_p))
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_marginal), 0.0)  # p log p -> 0, where log p may be -inf
    return kl.sum(dim=1).mean().exp()
