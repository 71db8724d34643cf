"""The training objective: flow matching on a path, with the time distribution and the losses of LightningDiT.

    x_t = alpha x1 + sigma x0,   loss = mean (model(x_t, t) - v)^2,   cos_loss = mean (1 - cos(model(x_t, t), v))

Lipman et al. 2023, eq. 9; Esser et al. 2024, section 3.1 (logit-normal t); Yao et al. 2025 (LightningDiT), section 4.2.
A network may predict the velocity v, the score or the noise x0: `Transport.velocity` and `Transport.score` turn its
output into what the samplers integrate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vavae_fast.errors import is_number, require
from vavae_fast.flow.paths import PATHS, Path, like, look_up, require_like

_SINGULAR_EPS = 1e-3  # distance kept from a time where a coefficient is infinite


def create_transport(
    path_type: str = "Linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    train_eps: float | None = None,
    sample_eps: float | None = None,
    use_cosine_loss: bool | None = False,
    use_lognorm: bool | None = False,
    partitial_train: tuple[float, float] | None = None,
    partial_ratio: float = 1.0,
    shift_lg: bool = False,
    fused: bool = False,
) -> "Transport":
    """The reference's constructor. path_type "Linear" | "GVP" | "VP", prediction "velocity" | "score" | "noise",
    loss_weight None | "velocity" | "likelihood" (score and noise only).

    train_eps, sample_eps: distance kept from t = 0 and 1 in training and in sampling. None: 0 where the velocity is
    finite everywhere (Linear and GVP with velocity prediction), else 1e-3, and 1e-5 for training on VP.
    partitial_train = (a, b): a share `partial_ratio` of the samples draws t from [a, b] only.
    fused: interpolation and loss by `vavae_kernels`, equal to rounding.
    """
    look_up(PATHS, path_type, "transport.path_type")
    smooth = path_type != "VP" and prediction == "velocity"
    default_train, default_sample = (0.0, 0.0) if smooth else (1e-5 if path_type == "VP" else _SINGULAR_EPS, _SINGULAR_EPS)
    return Transport(
        path_type=path_type,
        prediction=prediction,
        loss_weight=loss_weight,
        train_eps=default_train if train_eps is None else train_eps,
        sample_eps=default_sample if sample_eps is None else sample_eps,
        use_cosine_loss=bool(use_cosine_loss),
        use_lognorm=bool(use_lognorm),
        partitial_train=tuple(partitial_train) if isinstance(partitial_train, list) else partitial_train,
        partial_ratio=partial_ratio,
        shift_lg=shift_lg,
        fused=fused,
    )


@dataclass(frozen=True)
class Transport:
    """What a network predicts on which path, and how it is trained. Made by `create_transport`."""

    path_type: str
    prediction: str
    loss_weight: str | None
    train_eps: float
    sample_eps: float
    use_cosine_loss: bool
    use_lognorm: bool
    partitial_train: tuple[float, float] | None
    partial_ratio: float
    shift_lg: bool
    fused: bool

    def __post_init__(self):
        look_up(PATHS, self.path_type, "transport.path_type")
        look_up(_VELOCITIES, self.prediction, "transport.prediction")
        look_up(_WEIGHTS, self.loss_weight or "none", "transport.loss_weight")
        is_velocity = self.prediction == "velocity"
        unweighted = self.loss_weight in (None, "none")
        require(unweighted or not is_velocity, "transport.loss_weight", self.loss_weight, "null when the velocity is predicted")
        require(is_velocity or not self.use_cosine_loss, "transport.use_cosine_loss", True, "false unless the velocity is predicted")
        for key in ("train_eps", "sample_eps"):
            value = getattr(self, key)
            require(is_number(value) and 0 <= value < 0.5, f"transport.{key}", value, "a number in [0, 0.5)")
        share = self.partial_ratio
        require(is_number(share) and 0 <= share <= 1, "transport.partial_ratio", share, "a number in [0, 1]")
        if self.partitial_train is not None:
            interval = self.partitial_train
            pair = isinstance(interval, tuple) and len(interval) == 2 and all(map(is_number, interval))
            require(pair and 0 <= interval[0] < interval[1] <= 1, "transport.partitial_train", interval, "two times 0 <= a < b <= 1")
            require(not self.shift_lg, "transport.shift_lg", True, "false with partitial_train: the two are not compatible")
        require(self.use_lognorm or not self.shift_lg, "transport.shift_lg", True, "false unless use_lognorm")
        fusable = self.path_type == "Linear" and is_velocity
        require(fusable or not self.fused, "transport.fused", True, "false unless path_type is Linear and prediction is velocity")

    @property
    def path(self) -> Path:
        return PATHS[self.path_type]

    # Training

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x1: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        sp_timesteps: tuple[float, float] | None = None,
        shifted_mu: float = 0.0,
        x0: Tensor | None = None,
        t: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """x1 (B, C, ...) data -> {"loss": (B,), "pred": (B, C, ...)} and "cos_loss": (B,) with use_cosine_loss.

        model(x_t, t (B,), **model_kwargs) -> (B, C, ...) of any float type; losses are float32 (float64 for float64).
        x0 (B, C, ...) and t (B,) are drawn on x1's device when not given; sp_timesteps draws t uniformly from that
        interval (validation); shifted_mu moves the logit-normal (with shift_lg).
        """
        x0 = torch.randn_like(x1) if x0 is None else x0
        t = self.sample_times(x1.shape[0], x1.device, sp_timesteps=sp_timesteps, shifted_mu=shifted_mu) if t is None else t
        t = t.to(x1)
        if self.fused:
            return self._fused_losses(model, x0, x1, t, model_kwargs or {})
        xt = self.path.interpolate(x0, x1, t)
        pred = model(xt, t, **(model_kwargs or {}))
        require_like(pred, x1)
        terms = {"pred": pred}
        exact = pred.to(torch.promote_types(torch.promote_types(pred.dtype, x1.dtype), torch.float32))
        if self.prediction == "velocity":
            v = self.path.velocity(x0, x1, t).to(exact.dtype)
            terms["loss"] = _mean_flat((exact - v) ** 2)
            if self.use_cosine_loss:
                terms["cos_loss"] = _mean_flat(1 - torch.nn.functional.cosine_similarity(exact, v, dim=1))
        else:
            sigma = self.path.sigma(like(t, x1))
            residual = exact - x0 if self.prediction == "noise" else exact * sigma + x0  # the score is -x0 / sigma
            weight = _WEIGHTS[self.loss_weight or "none"](self.path.spread(like(t, x1)), sigma)
            terms["loss"] = _mean_flat(weight * residual**2)
        return terms

    def _fused_losses(self, model, x0: Tensor, x1: Tensor, t: Tensor, model_kwargs: dict[str, Any]) -> dict[str, Tensor]:
        from vavae_kernels import flow_interpolate, flow_loss

        pred = model(flow_interpolate(x0, x1, t), t, **model_kwargs)
        require_like(pred, x1)
        loss, cosine = flow_loss(pred, x0, x1)
        return {"pred": pred, "loss": loss} | ({"cos_loss": cosine} if self.use_cosine_loss else {})

    def sample_times(
        self,
        batch: int,
        device: torch.device | str,
        generator: torch.Generator | None = None,
        sp_timesteps: tuple[float, float] | None = None,
        shifted_mu: float = 0.0,
    ) -> Tensor:
        """(batch,) float32 training times, drawn on `device`."""
        draw = (torch.randn if self.use_lognorm else torch.rand)(batch, device=device, generator=generator)
        return self.times_from(draw, sp_timesteps, shifted_mu)

    def times_from(self, draw: Tensor, sp_timesteps: tuple[float, float] | None = None, shifted_mu: float = 0.0) -> Tensor:
        """Training times (B,) as a function of one draw a sample: standard normal if `use_lognorm`, else uniform on (0, 1).

        Logit-normal t = sigmoid(shifted_mu + n), or uniform, mapped to the path's interval. sp_timesteps: uniform on it.
        """
        require(self.shift_lg or shifted_mu == 0, "shifted_mu", shifted_mu, "0 unless transport.shift_lg")
        if sp_timesteps is not None:
            u = torch.special.ndtr(draw) if self.use_lognorm else draw
            return sp_timesteps[0] + (sp_timesteps[1] - sp_timesteps[0]) * u
        if self.partitial_train is not None:
            return self._partial_times(draw)
        t0, t1 = self.interval()
        return t0 + (t1 - t0) * (torch.sigmoid(draw + shifted_mu) if self.use_lognorm else draw)

    def _partial_times(self, draw: Tensor) -> Tensor:
        """A mixture by inversion: the draw's quantile first chooses the interval, then the place inside it.

        float64, since a quantile near 0 or 1 has to survive two changes of variable. The reference chooses once a
        batch; once a sample has the same distribution of t and does not depend on the batch.
        """
        (a, b), (t0, t1) = self.partitial_train, self.interval()
        u = torch.special.ndtr(draw.double()) if self.use_lognorm else draw.double()
        share = self.partial_ratio
        inside = u < share
        u = torch.where(inside, u / max(share, 1e-9), (u - share) / max(1 - share, 1e-9))
        if not self.use_lognorm:
            return torch.where(inside, a + (b - a) * u, t0 + (t1 - t0) * u).to(draw.dtype)
        low, high = torch.special.ndtr(torch.logit(torch.tensor([a, b], dtype=torch.float64))).tolist()  # on the host
        truncated = torch.sigmoid(torch.special.ndtri(low + (high - low) * u))
        return torch.where(inside, truncated, t0 + (t1 - t0) * torch.sigmoid(torch.special.ndtri(u))).to(draw.dtype)

    # Sampling

    def interval(
        self, sample: bool = False, sde: bool = False, diffusion_form: str = "SBDM", last_step_size: float = 0.0
    ) -> tuple[float, float]:
        """(t0, t1) of training, or with `sample` of the ODE or the SDE.

        An SDE needs the score, which is infinite at t = 1, and form SBDM is infinite where the path starts at pure noise;
        so there an eps of 0 counts as 1e-3. Its last step, of `last_step_size`, goes from t1 to 1.
        """
        eps = self.sample_eps if sample else self.train_eps
        if sde:
            eps = eps or _SINGULAR_EPS
        keep_from_start = self.path.starts_at_noise and (not sde or self.prediction != "velocity" or diffusion_form == "SBDM")
        return (eps if keep_from_start else 0.0), 1.0 - (last_step_size if sde and last_step_size > 0 else eps)

    def velocity(self, pred: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The network's output at (x, t) as the velocity of the probability-flow ODE, (B, ...), at least of x's precision:
        a step times a bf16 velocity would be rounded once more. `BadInput` where the output is not of x's shape."""
        return _VELOCITIES[self.prediction](self.path, _at_least(pred, x), x, t)

    def score(self, pred: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The network's output at (x, t) as the score, grad log p_t(x), (B, ...); precision and error as in `velocity`."""
        return _SCORES[self.prediction](self.path, _at_least(pred, x), x, t)


_VELOCITIES: dict[str, Callable[[Path, Tensor, Tensor, Tensor], Tensor]] = {
    "velocity": lambda path, pred, x, t: pred,
    "score": lambda path, pred, x, t: path.velocity_from_score(pred, x, t),
    "noise": lambda path, pred, x, t: path.velocity_from_noise(pred, x, t),
}
_SCORES: dict[str, Callable[[Path, Tensor, Tensor, Tensor], Tensor]] = {
    "velocity": lambda path, pred, x, t: path.score_from_velocity(pred, x, t),
    "score": lambda path, pred, x, t: pred,
    "noise": lambda path, pred, x, t: -pred / path.sigma(like(t, x)),
}
# Weights of the squared residual of score and noise, from (spread, sigma): SiT, section 2.3.
_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor | float]] = {
    "none": lambda spread, sigma: 1.0,
    "velocity": lambda spread, sigma: (spread / sigma) ** 2,
    "likelihood": lambda spread, sigma: spread / sigma**2,
}


def _at_least(pred: Tensor, x: Tensor) -> Tensor:
    return require_like(pred, x).to(torch.promote_types(pred.dtype, x.dtype))


def _mean_flat(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)
