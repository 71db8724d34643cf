"""The adversary of the tokenizer's training: does a patch of an image look real?

Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks" (PatchGAN), with the layers and
the state-dict keys (`main.N.*`) of taming-transformers; a reference checkpoint keeps it under `loss.discriminator.`.
"""

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Images (N, in_channels, H, W) -> logits (N, 1, H / 2^n - 2, W / 2^n - 2), one a patch; high means real.

    n = n_layers convolutions of stride 2, then two of stride 1; the widths double from `ndf` up to 8 ndf. The smallest
    image is 3 * 2^n pixels a side: 24 for the published 3 layers, 12 for 2, 6 for 1.
    """

    def __init__(self, in_channels: int = 3, ndf: int = 64, n_layers: int = 3):
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"PatchDiscriminator: n_layers is {n_layers}, expected 1 or more")
        self.n_layers = n_layers
        widths = [ndf * min(2**n, 8) for n in range(n_layers + 1)]
        layers = [_conv(in_channels, ndf, stride=2, bias=True), nn.LeakyReLU(0.2)]
        for n, (before, width) in enumerate(zip(widths, widths[1:]), start=1):
            # Batch norm subtracts what a bias would add.
            stride = 2 if n < n_layers else 1
            layers += [_conv(before, width, stride, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        layers.append(_conv(widths[-1], 1, stride=1, bias=True))
        self.main = nn.Sequential(*layers)
        self.main.apply(_initialise)

    @property
    def smallest_image(self) -> int:
        """Pixels a side that still leave one patch."""
        return 3 * 2**self.n_layers

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < self.smallest_image:
            raise ValueError(f"PatchDiscriminator: images are {x.shape[-2]} x {x.shape[-1]}, {self.n_layers} layers need "
                             f"{self.smallest_image} pixels a side; lower disc_num_layers")  # fmt: skip
        return self.main(x)


def _conv(c_in: int, c_out: int, stride: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 4, stride=stride, padding=1, bias=bias)


def _initialise(module: nn.Module) -> None:
    """DCGAN's: weights N(0, 0.02), norm weights N(1, 0.02); convolution biases keep PyTorch's default."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
