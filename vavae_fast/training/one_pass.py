"""The gradients of a tokenizer step with each network run as rarely as they allow: those of `plain_gradients`, to rounding.

The graph is cut at the latent z and at the reconstruction r. Each loss is differentiated up to a cut once; what crosses a cut is a
vector, and vectors that meet there are summed before the network below runs backward.

    at r     v_nll = d nll / d r      v_gan = d g_loss / d r      v = v_nll + lambda_gan v_gan
    at z     u_nll = J^T v_nll        u_vf = d vf / d z           u = J^T v + lambda_vf u_vf           J = d r / d z
    weights  lambda_gan: |W^T v_nll| / |W^T v_gan|, W = d r / d (decoder's last layer)
             lambda_vf:  |E^T u_nll| / |E^T u_vf|,  E = d z / d (encoder's last layer)

Passes of a convolution (forward, data gradient, weight gradient), with both adaptive weights:

                    encoder   decoder   LPIPS     discriminator
    plain           1, 1, 1   1, 2, 1   2, 3, 0   3, 4, 2
    one pass        1, 1, 1   1, 2, 1   2, 1, 0   2, 3, 2
    before the GAN  1, 1, 1   1, 1, 1   2, 1, 0   0, 0, 0

The decoder's second data gradient is J^T v_nll, of which lambda_vf alone has a use. The discriminator judges r once: its logits serve
g_loss and d_loss, whose step comes after both.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from vavae_fast.data.images import ImageBatch
from vavae_fast.losses import (
    alignment_terms,
    discriminator_objective,
    discriminator_terms,
    generator_loss,
    gradient_ratio,
    kl_loss,
    reconstruction_terms,
    terms_off,
    vjp,
    weighted_sum,
    wide,
)
from vavae_fast.training.beside import beside
from vavae_fast.training.tokenizer import Gradients, TokenizerState

Terms = dict[str, Tensor]


def one_pass_gradients(state: TokenizerState, step: int, batch: ImageBatch) -> tuple[Terms, Gradients]:
    """The terms of one micro-batch and the gradient of each trained parameter, as `plain_gradients` gives them. No host sync."""
    weights, images = state.weights, state.images(batch)
    with state.autocast():
        features = None if state.foundation is None else beside(state.foundation_stream, state.foundation, images)
        posterior = state.autoencoder.encode(images)
        z, kl = state.sample(posterior, batch), kl_loss(posterior)
        z_cut = _cut(z)
        r = wide(state.autoencoder.decode(z_cut))
        r_cut = _cut(r)

        terms = reconstruction_terms(images, r_cut, weights, state.perceptual) | dict(kl=kl) | terms_off(images)
        (v_nll,) = vjp(terms["nll"], [r_cut])
        judgement, v_gan, gradients = _judge(state, step, images, r_cut)
        terms |= judgement

        u_nll, u, terms["d_weight"], of_decoder = _through_decoder(state, step, r, z_cut, v_nll, v_gan)
        gradients |= of_decoder
        if features is not None:
            terms |= alignment_terms(state.alignment(z_cut, features()), weights)
            projection = _trained(state.projection)
            u_vf, *of_projection = vjp(terms["vf_loss"], [z_cut, *projection])
            terms["vf_weight"] = _vf_weight(state, z, u_nll, u_vf)
            u = u + terms["vf_weight"] * u_vf
            gradients |= {p: terms["vf_weight"] * gradient for p, gradient in zip(projection, of_projection)}
        encoder = _trained(state.autoencoder.encoder, state.autoencoder.quant_conv)
        gradients |= dict(zip(encoder, vjp([z, weights.kl_weight * kl], encoder, [u, None])))
    return {"loss": weighted_sum(terms, step, weights), **terms}, gradients


def _cut(x: Tensor) -> Tensor:
    """x as the start of a graph of its own."""
    return x.detach().requires_grad_()


def _trained(*modules: nn.Module) -> list[nn.Parameter]:
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def _judge(state: TokenizerState, step: int, images: Tensor, r_cut: Tensor) -> tuple[Terms, Tensor | None, Gradients]:
    """The discriminator's terms, v_gan = d g_loss / d r (None while the autoencoder does not feel it), and its own gradients."""
    weights, discriminator = state.weights, state.discriminator
    if weights.discriminator_factor(step) <= 0:
        return {}, None, {}
    judging = _trained(discriminator)
    if weights.generator_factor(step) <= 0:  # the discriminator's first step, an iteration before the autoencoder's
        terms = discriminator_objective(images, r_cut, step, weights, discriminator)
        return terms, None, dict(zip(judging, vjp(terms["d_loss"], judging)))
    before = _running_statistics(discriminator)
    fake = discriminator(r_cut)
    after = _running_statistics(discriminator)
    g_loss = generator_loss(fake)
    (v_gan,) = vjp(g_loss, [r_cut], keep=True)
    terms = discriminator_terms(discriminator(images), fake, step, weights) | dict(g_loss=g_loss)
    gradients = dict(zip(judging, vjp(terms["d_loss"], judging)))
    _update_again(discriminator, before, after)
    return terms, v_gan, gradients


def _through_decoder(
    state: TokenizerState, step: int, r: Tensor, z_cut: Tensor, v_nll: Tensor, v_gan: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor, Gradients]:
    """J^T v_nll (None where lambda_vf does not ask for it), J^T v, d_weight and the decoder's gradients.

    The gradient at the last layer is linear in v: the two that d_weight compares add up to it.
    """
    vae, weights = state.autoencoder, state.weights
    last = vae.last_decoder_weight
    body = [p for p in _trained(vae.post_quant_conv, vae.decoder) if p is not last]
    if v_gan is None:
        u, of_last, *of_body = vjp(r, [z_cut, last, *body], v_nll)
        return u, u, v_nll.new_zeros(()), {last: of_last, **dict(zip(body, of_body))}
    if state.foundation is not None and weights.adaptive_vf:
        u_nll, of_nll = vjp(r, [z_cut, last], v_nll, keep=True)
    else:
        u_nll, (of_nll,) = None, vjp(r, [last], v_nll, keep=True)
    (of_gan,) = vjp(r, [last], v_gan, keep=True)
    d_weight = weights.disc_weight * gradient_ratio(of_nll, of_gan, 1e4)
    share = d_weight * weights.generator_factor(step)
    u, *of_body = vjp(r, [z_cut, *body], v_nll + share * v_gan)
    return u_nll, u, d_weight, {last: of_nll + share * of_gan, **dict(zip(body, of_body))}


def _vf_weight(state: TokenizerState, z: Tensor, u_nll: Tensor | None, u_vf: Tensor) -> Tensor:
    """vf_weight, (): times the ratio of the two gradients at the encoder's last layer when it is adaptive."""
    weights, last = state.weights, state.autoencoder.last_encoder_weight
    if not weights.adaptive_vf:
        return u_vf.new_full((), weights.vf_weight)
    (of_nll,), (of_vf,) = vjp(z, [last], u_nll, keep=True), vjp(z, [last], u_vf, keep=True)
    return weights.vf_weight * gradient_ratio(of_nll, of_vf, 1e8)


def _batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d) and module.training]


def _running_statistics(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(norm.running_mean.clone(), norm.running_var.clone()) for norm in _batch_norms(network)]


def _update_again(network: nn.Module, before: Sequence[tuple[Tensor, Tensor]], after: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Update running statistics R once more with the batch b that took them from `before` to `after` = (1 - m) before + m b.

    The plain formulation runs the discriminator on r, x and r again: (1 - m) R + m b = after + (1 - m) (R - before).
    """
    for norm, olds, news in zip(_batch_norms(network), before, after):
        for running, old, new in zip((norm.running_mean, norm.running_var), olds, news):
            running.copy_(new + (1 - norm.momentum) * (running - old))
        norm.num_batches_tracked += 1
