"""LightningDiT: a diffusion transformer on latents.  Yao et al. 2025 (arXiv 2501.01423), section 4; DiT, Peebles & Xie 2023.

State-dict keys, initialisation and numerics are those of the public LightningDiT code, so its checkpoints load as they
are. The same parameters run two ways: `fused=False` is the plain PyTorch below, `fused=True` calls `vavae_kernels`.
The parts below the block are in `lightningdit_layers.py`, counts of parameters, FLOPs and memory in `lightningdit_cost.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vavae_fast.errors import BadInput, is_integer, is_number, require
from vavae_fast.models.activation_checkpointing import Checkpointing, checkpointed
from vavae_fast.models.lightningdit_layers import (
    Attention,
    FusedAttention,
    FusedSwiGLUFFN,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    RMSNorm,
    RotaryEmbedding2D,
    SwiGLUFFN,
    TimestepEmbedder,
    modulate,
    sincos_positions,
    token_norm,
)
from vavae_kernels import gate_add_norm_modulate, norm_modulate
from vavae_kernels.attention_backends import check_backend

_WIDTHS = {  # depth, hidden_size, num_heads
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "1p0B": (24, 1536, 24),
    "1p6B": (28, 1792, 28),
}
LIGHTNINGDIT_SIZES: dict[str, dict[str, int]] = {
    f"LightningDiT-{name}/{patch_size}": dict(depth=depth, hidden_size=width, num_heads=heads, patch_size=patch_size)
    for name, (depth, width, heads) in _WIDTHS.items()
    for patch_size in (1, 2)
}


def create_lightningdit(
    name: str,
    input_size: int = 16,
    in_channels: int = 32,
    num_classes: int = 1000,
    use_qknorm: bool = False,
    use_swiglu: bool = True,
    use_rope: bool = True,
    use_rmsnorm: bool = True,
    wo_shift: bool = False,
    learn_sigma: bool = False,
    class_dropout_prob: float = 0.1,
    use_checkpoint: Checkpointing = False,
    fused: bool = False,
    attention: str = "auto",
    residual_dtype: torch.dtype | None = None,
    mlp_ratio: float = 4.0,
    hidden_size: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    patch_size: int | None = None,
) -> "LightningDiT":
    """A model of `LIGHTNINGDIT_SIZES` by name, or "custom" with hidden_size, depth, num_heads (patch_size defaults to 1)."""
    given = dict(depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size)
    if name == "custom":
        lacking = [key for key in ("hidden_size", "depth", "num_heads") if given[key] is None]
        if lacking:
            raise BadInput(f"model_type custom needs {', '.join(lacking)}")
        size = {**given, "patch_size": 1 if patch_size is None else patch_size}
    elif name in LIGHTNINGDIT_SIZES:
        size = LIGHTNINGDIT_SIZES[name]
        for key, value in given.items():
            if value not in (None, size[key]):
                raise BadInput(f"{name} has {key} {size[key]}, got {value}; for another {key} use model_type custom")
    else:
        raise BadInput(f"unknown model_type {name!r}; known: custom, {', '.join(LIGHTNINGDIT_SIZES)}")
    return LightningDiT(
        input_size=input_size,
        in_channels=in_channels,
        mlp_ratio=mlp_ratio,
        class_dropout_prob=class_dropout_prob,
        num_classes=num_classes,
        learn_sigma=learn_sigma,
        use_qknorm=use_qknorm,
        use_swiglu=use_swiglu,
        use_rope=use_rope,
        use_rmsnorm=use_rmsnorm,
        wo_shift=wo_shift,
        use_checkpoint=use_checkpoint,
        fused=fused,
        attention=attention,
        residual_dtype=residual_dtype,
        **size,
    )


class LightningDiT(nn.Module):
    """Velocity (or noise, or score) of a noisy latent at time t, given its class.

    input_size is the height and width of the latent, num_classes the number of labels (label num_classes is the null
    class when class_dropout_prob > 0). use_checkpoint recomputes each block in backward instead of keeping its
    activations, see `activation_checkpointing`. residual_dtype is that of the stream between blocks; None leaves it to the
    inputs: fp32 under autocast, as in the reference.
    learn_sigma predicts twice the channels, as DiT does, and returns the first half. attention is a backend's
    name, see `vavae_kernels.attention_backends`; "fused" works on packed qkv and needs fused=True.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 32,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        use_qknorm: bool = False,
        use_swiglu: bool = False,
        use_rope: bool = False,
        use_rmsnorm: bool = False,
        wo_shift: bool = False,
        use_checkpoint: Checkpointing = False,
        fused: bool = False,
        attention: str = "auto",
        residual_dtype: torch.dtype | None = None,
    ):
        config = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        self.config = config  # the arguments, to build the same model again
        for key in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            require(is_integer(config[key]) and config[key] > 0, key, config[key], "an integer above 0")
        mlp_hidden = int(hidden_size * mlp_ratio) if is_number(mlp_ratio) else 0
        channels = int(2 / 3 * mlp_hidden) if use_swiglu else mlp_hidden
        require(channels > 0, "mlp_ratio", mlp_ratio, "a number above 0 that leaves the feed-forward a channel or more")
        dropped = is_number(class_dropout_prob) and 0 <= class_dropout_prob < 1
        require(dropped, "class_dropout_prob", class_dropout_prob, "a number in [0, 1)")
        require(input_size % patch_size == 0, "input_size", input_size, f"a multiple of patch_size {patch_size}")
        require(hidden_size % num_heads == 0, "hidden_size", hidden_size, f"a multiple of num_heads {num_heads}")
        require(hidden_size % 4 == 0, "hidden_size", hidden_size, "a multiple of 4 (sine and cosine of two axes)")
        head_dim = hidden_size // num_heads
        require(not use_rope or head_dim % 4 == 0, "hidden_size / num_heads", head_dim, "a multiple of 4 (pairs on two axes)")
        require(use_checkpoint in (False, True, "selective"), "use_checkpoint", use_checkpoint, "true, false or selective")
        check_backend("LightningDiT", attention)
        require(fused or attention != "fused", "attention", attention, "another backend: this one needs fused=True")

        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels, self.out_channels = in_channels, in_channels * (2 if learn_sigma else 1)
        self.hidden_size, self.depth, self.num_heads = hidden_size, depth, num_heads
        self.num_classes, self.learn_sigma = num_classes, learn_sigma
        self.use_rope, self.use_rmsnorm, self.fused, self.residual_dtype = use_rope, use_rmsnorm, fused, residual_dtype
        grid = input_size // patch_size

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, hidden_size), requires_grad=False)
        self.feat_rope = RotaryEmbedding2D(head_dim, grid) if use_rope else None
        block = FusedLightningDiTBlock if fused else LightningDiTBlock
        options = (use_qknorm, use_swiglu, use_rmsnorm, wo_shift, use_checkpoint, attention)
        self.blocks = nn.ModuleList(block(hidden_size, num_heads, mlp_ratio, *options) for _ in range(depth))
        final_layer = FusedFinalLayer if fused else FinalLayer
        self.final_layer = final_layer(hidden_size, patch_size, self.out_channels, use_rmsnorm)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Fill every parameter and buffer; also after `to_empty`, when the model was built on the meta device.

        Linear layers Xavier-uniform; embeddings N(0, 0.02²); the modulation and the last layer zero (adaLN-Zero: each
        block starts as the identity); positions are fixed sines and cosines.
        """
        self.apply(_init_layer)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_positions(self.hidden_size, self.input_size // self.patch_size).unsqueeze(0))
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as the linear layer that it is
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        modulations = [module.adaLN_modulation[-1] for module in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop_labels: Tensor | None = None) -> Tensor:
        """x (N, C, H, W) noisy latents, t (N,) times in [0, 1], y (N,) integer labels -> (N, C, H, W).

        drop_labels (N,) bool: whose label becomes the null class. Without it labels are dropped at random in training
        mode, with probability class_dropout_prob, and kept in evaluation mode.
        """
        self._check(x, t, y, drop_labels)
        x = self.x_embedder(x) + self.pos_embed  # fp32 positions: under autocast the residual stream is fp32
        if self.residual_dtype is not None:
            x = x.to(self.residual_dtype)
        c = self.t_embedder(t) + self.y_embedder(y, drop_labels)  # (N, D)
        if self.fused:
            x = self._fused_blocks(x, c)
        else:
            for block in self.blocks:
                x = block(x, c, self.feat_rope)
            x = self.final_layer(x, c)
        x = self.unpatchify(x)
        return x.chunk(2, dim=1)[0] if self.learn_sigma else x

    def _fused_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        """A block's last gate and addition wait for the norm of the next, so the chain carries (residual, y, gate)."""
        y = gate = None
        for block in self.blocks:
            x, y, gate = block(x, y, gate, c, self.feat_rope)
        return self.final_layer(x, y, gate, c)

    def _check(self, x: Tensor, t: Tensor, y: Tensor, drop_labels: Tensor | None) -> None:
        for name, tensor in dict(x=x, t=t, y=y).items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"LightningDiT: {name} must be a tensor, got {type(tensor).__name__}")
        expected = (self.in_channels, self.input_size, self.input_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"LightningDiT: x has shape {tuple(x.shape)}, expected (N, {', '.join(map(str, expected))})")
        for name, tensor in dict(t=t, y=y, drop_labels=drop_labels).items():
            if tensor is not None and tuple(tensor.shape) != (x.shape[0],):
                raise ValueError(f"LightningDiT: {name} has shape {tuple(tensor.shape)}, expected ({x.shape[0]},)")
        if y.is_floating_point():
            raise ValueError(f"LightningDiT: y must hold integer labels, got {y.dtype}")

    def unpatchify(self, x: Tensor) -> Tensor:
        """x (N, T, p · p · C) -> (N, C, H, W)."""
        grid, p = self.input_size // self.patch_size, self.patch_size
        x = x.unflatten(2, (p, p, self.out_channels)).unflatten(1, (grid, grid))  # n h w p q c
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.out_channels, grid * p, grid * p)

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        cfg_interval: bool | None = None,
        cfg_interval_start: float | None = None,
        cfg_interval_end: float = 1.0,
        cfg_channels: int | str = 3,
    ) -> Tensor:
        """Classifier-free guidance, Ho & Salimans 2022: v = v_null + cfg_scale (v_label - v_null).

        x (2N, C, H, W), of which the second half is ignored; t (2N,); y (2N,) the labels, then the null class -> (2N, C, H, W):
        guided twice. Only the first `cfg_channels` channels are guided (3 is the public code's, "all" is the formula's);
        the others stay each half's own. With cfg_interval, a sample is guided only where cfg_interval_start <= t <=
        cfg_interval_end (1: no upper bound), and keeps v_label elsewhere (Kynkäänniemi et al. 2024). Never waits for the device.
        """
        if len(x) % 2:
            raise ValueError(f"forward_with_cfg: x must hold 2N samples, got {len(x)}")
        if cfg_interval and cfg_interval_start is None:
            raise ValueError("forward_with_cfg: cfg_interval needs cfg_interval_start")
        guided_channels = self.in_channels if cfg_channels == "all" else cfg_channels
        if not isinstance(guided_channels, int) or guided_channels < 0:
            raise ValueError(f"forward_with_cfg: cfg_channels must be 'all' or a number of channels, got {cfg_channels!r}")

        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        v, rest = out[:, :guided_channels], out[:, guided_channels:]
        v_label, v_null = v.chunk(2)
        guided = v_null + cfg_scale * (v_label - v_null)
        if cfg_interval:
            times = t[: len(half)].view(-1, 1, 1, 1)
            inside = cfg_interval_start <= times
            if cfg_interval_end < 1.0:
                inside = inside & (times <= cfg_interval_end)
            guided = torch.where(inside, guided, v_label)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


class LightningDiTBlock(nn.Module):
    """x + gate · attention(modulated norm of x), then the same with the MLP; (shift, scale, gate) come from c."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        use_qknorm: bool,
        use_swiglu: bool,
        use_rmsnorm: bool,
        wo_shift: bool,
        use_checkpoint: Checkpointing = False,
        backend: str = "auto",
    ):
        super().__init__()
        attention, swiglu_ffn = self._parts()
        mlp_hidden = int(hidden_size * mlp_ratio)
        self.norm1 = token_norm(hidden_size, use_rmsnorm)
        self.norm2 = token_norm(hidden_size, use_rmsnorm)
        self.attn = attention(hidden_size, num_heads, use_qknorm, use_rmsnorm, backend)
        self.mlp = swiglu_ffn(hidden_size, int(2 / 3 * mlp_hidden)) if use_swiglu else Mlp(hidden_size, mlp_hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, (4 if wo_shift else 6) * hidden_size))
        self.wo_shift, self.use_checkpoint = wo_shift, use_checkpoint

    def _parts(self) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
        return Attention, SwiGLUFFN

    def modulation(self, c: Tensor) -> tuple[Tensor | None, ...]:
        """c (N, D) -> shift, scale, gate of the attention, shift, scale, gate of the MLP: views of one tensor."""
        chunks = self.adaLN_modulation(c)
        if self.wo_shift:
            scale_msa, gate_msa, scale_mlp, gate_mlp = chunks.chunk(4, dim=1)
            return None, scale_msa, gate_msa, None, scale_mlp, gate_mlp
        return chunks.chunk(6, dim=1)

    def forward(self, x: Tensor, c: Tensor, feat_rope: nn.Module | None = None) -> Tensor:
        """x (N, T, D), c (N, D) -> (N, T, D). Checkpointing lies inside, where a compiler and FSDP's hooks want it."""
        return checkpointed(self.transform, self.use_checkpoint, x, c, feat_rope)

    def transform(self, x: Tensor, c: Tensor, feat_rope: nn.Module | None) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(c)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rope=feat_rope)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FusedLightningDiTBlock(LightningDiTBlock):
    """The same block as operators: each gate and addition runs in one pass with the norm and modulation after it."""

    def _parts(self) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
        return FusedAttention, FusedSwiGLUFFN

    def forward(
        self, residual: Tensor, y: Tensor | None, gate: Tensor | None, c: Tensor, feat_rope: nn.Module | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """residual + gate · y is the block's input; y and gate are None before the first block. Returns the same three."""
        return checkpointed(self.transform, self.use_checkpoint, residual, y, gate, c, feat_rope)

    def transform(
        self, residual: Tensor, y: Tensor | None, gate: Tensor | None, c: Tensor, feat_rope: nn.Module | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(c)
        residual, h = _add_norm_modulate(residual, y, gate, scale_msa, shift_msa, self.norm1)
        y = self.attn(h, rope=feat_rope)
        residual, h = _add_norm_modulate(residual, y, gate_msa, scale_mlp, shift_mlp, self.norm2)
        return residual, self.mlp(h), gate_mlp


def _add_norm_modulate(residual, y, gate, scale, shift, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """-> residual + gate · y, and its norm, modulated."""
    kind = "rms" if isinstance(norm, RMSNorm) else "layer"
    if y is None:
        return residual, norm_modulate(residual, scale, shift, norm.weight, kind, norm.eps)
    return gate_add_norm_modulate(residual, y, gate, scale, shift, norm.weight, kind, norm.eps)


class FinalLayer(nn.Module):
    """Modulated norm and a linear layer to the pixels of each patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, use_rmsnorm: bool):
        super().__init__()
        self.norm_final = token_norm(hidden_size, use_rmsnorm)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N, T, D), c (N, D) -> (N, T, p · p · C)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class FusedFinalLayer(FinalLayer):
    """The same layer, which also closes the last block's gate."""

    def forward(self, residual: Tensor, y: Tensor, gate: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(_add_norm_modulate(residual, y, gate, scale, shift, self.norm_final)[1])


def _init_layer(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (RMSNorm, nn.LayerNorm)) and module.weight is not None:
        nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, RotaryEmbedding2D):
        module.reset_parameters()
