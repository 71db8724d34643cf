"""Attention by name: softmax(q kᵀ · scale) v per head, by PyTorch, by a package, or by a function of your own.

Vaswani et al. 2017, equation 1; scale is 1 / sqrt(Dh) unless given; no mask, no dropout.

    sdpa         PyTorch. On CUDA cuDNN comes first, then flash, efficient, math: the first that takes the shape runs
    flash-attn   the package flash_attn (2), or flash_attn_interface (3) on sm_90 where it is installed
    xformers     xformers.ops.memory_efficient_attention
    math         the formula below, in at least fp32: the definition, for any shape and device
    fused        one kernel from packed qkv where no gradient is needed; only `qk_norm_rope_attention` can reach it

Shapes  q (B, H, N, Dh), k, v (B, H, M, Dh), views of packed qkv welcome: no backend copies them -> (B, H, N, Dh).
Dtypes  q, k and v share one, the result has it.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from sys import modules

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._checks import arithmetic_dtype, check, check_number, check_shape, check_tensors, without_autocast

HALF = (torch.float16, torch.bfloat16)
ANY_FLOAT = (*HALF, torch.float32, torch.float64)
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Backend:
    """What a backend takes, and how to get it: a row of the README's table. None stands for any."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor, float | None], Tensor] | None  # q, k, v, scale; None: needs packed qkv
    devices: Collection[str] | None = None  # torch.device.type
    dtypes: Collection[torch.dtype] | None = None
    head_dims: Collection[int] | None = None
    package: str | None = None  # import name
    install: str | None = None  # command that gets the package
    note: str = ""

    def why_not(self, q: Tensor) -> str | None:
        """A reason, "takes this, got that", if q (B, H, N, Dh) is outside of what the backend takes."""
        if self.devices is not None and q.device.type not in self.devices:
            return f"runs on {_listed(self.devices)}, q is on {q.device.type}"
        if self.dtypes is not None and q.dtype not in self.dtypes:
            return f"takes {_listed(self.dtypes)}, q is {_listed([q.dtype])}"
        if self.head_dims is not None and q.shape[3] not in self.head_dims:
            return f"takes head dimensions {_listed(self.head_dims)}, q has {q.shape[3]}"
        return None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, backend: str = "auto") -> Tensor:
    """softmax(q kᵀ · scale) v. q (B, H, N, Dh), k, v (B, H, M, Dh) of one dtype -> (B, H, N, Dh) in it.

    backend is a name of `BACKENDS`, or "auto" for "sdpa". Raises ValueError, in one line, for a shape or dtype that the
    backend does not take, and for a package that is not installed; nothing falls back to another backend.
    """
    op = "attention"
    row = _row(op, backend)
    check_tensors(op, q=q, k=k, v=v)
    check(q.ndim == 4 and q.shape[3] > 0, op, f"q must be (B, H, N, Dh) with Dh > 0, got shape {tuple(q.shape)}")
    check(k.ndim == 4 and (k.shape[2] > 0 or q.numel() == 0), op, f"k must be (B, H, M, Dh) with M > 0, got shape {tuple(k.shape)}")
    check_shape(op, "k", k, (q.shape[0], q.shape[1], k.shape[2], q.shape[3]))
    check_shape(op, "v", v, tuple(k.shape))
    for name, tensor in (("k", k), ("v", v)):
        check(tensor.dtype == q.dtype, op, f"{name} is {_listed([tensor.dtype])}, q is {_listed([q.dtype])}; cast them to one dtype")
    if scale is not None:
        check_number(op, "scale", scale)
        scale = float(scale)
    if row.run is None:
        raise ValueError(f"{op}: backend '{row.name}' is one kernel from packed qkv; call qk_norm_rope_attention, or take another backend")
    reason = row.why_not(q)
    check(reason is None, op, f"backend '{row.name}' {reason}; change that or take backend 'sdpa'")
    with without_autocast(q):
        out = (row.run if q.numel() else _math)(q, k, v, scale)
    check(out.shape == q.shape and out.dtype == q.dtype, op, f"backend '{row.name}' returned {out.dtype} of shape {tuple(out.shape)}")
    return out


def check_backend(op: str, backend: str) -> None:
    """Raise ValueError, in one line, unless `backend` is known and its package is installed. Imports nothing."""
    row = _row(op, backend)
    if row.package is not None and row.package not in modules and find_spec(row.package) is None:
        raise ValueError(_missing(op, row.name, f"{row.package} is not installed"))


def register_backend(
    name: str,
    run: Callable[[Tensor, Tensor, Tensor, float | None], Tensor],
    devices: Collection[str] | None = None,
    dtypes: Collection[torch.dtype] | None = None,
    head_dims: Collection[int] | None = None,
    note: str = "",
) -> None:
    """Add a backend of your own under a new name: run(q, k, v, scale) -> (B, H, N, Dh), as `attention` passes them.

    scale is None or a float, and None means 1 / sqrt(Dh). devices, dtypes and head_dims are what it takes, None any.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"register_backend: name must be a text that is not empty, got {name!r}")
    if name == "auto" or name in BACKENDS:
        raise ValueError(f"register_backend: there is a backend {name!r} already; take another name")
    if not callable(run):
        raise TypeError(f"register_backend: run must be a function of q, k, v and scale, got {type(run).__name__}")
    for limit, given in (("devices", devices), ("dtypes", dtypes), ("head_dims", head_dims)):
        if given is not None and (isinstance(given, str) or not isinstance(given, Collection)):
            raise TypeError(f"register_backend: {limit} must be None or several, as in a tuple, got {given!r}")
    BACKENDS[name] = Backend(name, run, devices, dtypes, head_dims, note=note)


def backend_table() -> list[str]:
    """Which backend takes what: the lines of a Markdown table."""
    head = ["| backend | devices | dtypes | head dimension | needs | note |", "|---|---|---|---|---|---|"]
    return head + [
        f"| `{row.name}` | {_listed(row.devices)} | {_listed(row.dtypes)} | {_listed(row.head_dims)} "
        f"| {f'`{row.install}`' if row.install else 'nothing more'} | {row.note} |"
        for row in BACKENDS.values()
    ]


def _row(op: str, backend: str) -> Backend:
    name = "sdpa" if backend == "auto" else backend
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{op}: unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]


def _listed(values: Collection | None) -> str:
    """Values of a row in words: "float16, bfloat16", "multiples of 8 to 256", "any"."""
    if values is None:
        return "any"
    if isinstance(values, range) and values.start == values.step:
        return f"multiples of {values.step} to {values[-1]}"
    return ", ".join(str(value).removeprefix("torch.") for value in values)


def _missing(op: str, backend: str, what: str) -> str:
    return f"{op}: backend {backend!r}: {what}; {BACKENDS[backend].install}"


def _math(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """The formula, rounded once, at the end."""
    dtype = arithmetic_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = torch.softmax(q.to(dtype) * scale @ k.to(dtype).mT, dim=-1)
    return (weights @ v.to(dtype)).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    if q.is_cuda and _must_put_cudnn_first(q.device):
        with sdpa_kernel(CUDNN_FIRST, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _constant_in_graphs(function: Callable) -> Callable:
    """What `torch.compiler.assume_constant_result` does, without its import of the whole compiler, Triton included."""
    function._dynamo_marked_constant = True
    return function


@_constant_in_graphs
def _must_put_cudnn_first(device: torch.device) -> bool:
    """Whether PyTorch would try another of its kernels before cuDNN, though cuDNN is sound and the caller left all enabled.

    On sm_90 and sm_10x PyTorch 2.11 and later try cuDNN first by themselves. Up to 9.15.0 cuDNN wrote out of bounds
    where the length is no multiple of 128 (pytorch/pytorch#169849), so there PyTorch's own order stays.
    """
    version, cuda = torch.backends.cudnn.version() or 0, torch.backends.cuda
    enabled = cuda.cudnn_sdp_enabled() and cuda.flash_sdp_enabled() and cuda.mem_efficient_sdp_enabled() and cuda.math_sdp_enabled()
    return version > 91500 and enabled and torch.cuda.get_device_capability(device)[0] not in (9, 10)


def _token_rows(x: Tensor) -> Tensor:
    """(B, H, N, Dh) -> (B, N, H, Dh), the packages' layout: a view, unless the head dimension itself is strided."""
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    flash = _flash_attn_3() if q.is_cuda and _is_hopper(q.device) else None
    if flash is None:
        try:
            from flash_attn import flash_attn_func as flash
        except ImportError as error:
            raise ValueError(_missing("attention", "flash-attn", _cause(error))) from None
    out = flash(_token_rows(q), _token_rows(k), _token_rows(v), softmax_scale=scale)
    out = out[0] if isinstance(out, tuple) else out  # early versions of 3 return (out, log-sum-exp)
    return out.transpose(1, 2)


def _flash_attn_3() -> Callable | None:
    try:
        from flash_attn_interface import flash_attn_func
    except ModuleNotFoundError:
        return None
    return flash_attn_func


@_constant_in_graphs
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ValueError(_missing("attention", "xformers", _cause(error))) from None
    return memory_efficient_attention(_token_rows(q), _token_rows(k), _token_rows(v), scale=scale).transpose(1, 2)


def _cause(error: ImportError) -> str:
    """A package that is not there, or one that is and does not import: usually built for another torch."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"the package does not import beside torch {torch.__version__} ({str(error).splitlines()[0][:160]})"


BACKENDS: dict[str, Backend] = {
    row.name: row
    for row in (
        Backend(
            "sdpa",
            _sdpa,
            dtypes=ANY_FLOAT,
            note="cuDNN takes float16 and bfloat16, head dimensions that are multiples of 8 to 128 and more than one key; what it "
            "does not take goes to PyTorch's flash, efficient or math kernel",
        ),
        Backend(
            "fused",
            None,
            devices=("cuda",),
            dtypes=(*HALF, torch.float32),
            head_dims=range(8, 129, 8),
            note="in `qk_norm_rope_attention` only: one Triton kernel from packed qkv, norm and rotary embedding included, where no "
            "gradient is needed, as `auto` elsewhere; made for 256 tokens and head dimensions 64, 72 and 128, right for any; not timed yet",
        ),
        Backend(
            "flash-attn",
            _flash_attn,
            devices=("cuda",),
            dtypes=HALF,
            head_dims=range(8, 257, 8),
            package="flash_attn",
            install="pip install flash-attn --no-build-isolation",
            note="sm_80 and later; on sm_90 version 3 (`flash_attn_interface`) where it is installed",
        ),
        Backend(
            "xformers",
            _xformers,
            devices=("cuda",),
            dtypes=(*HALF, torch.float32),
            head_dims=range(8, 257, 8),
            package="xformers",
            install="pip install xformers",
        ),
        Backend("math", _math, dtypes=ANY_FLOAT, note="the formula in at least float32: the definition, slow"),
    )
}
