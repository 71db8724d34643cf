"""What differs between machines: Triton, there or not, compiled or interpreted. Nothing elsewhere asks.

Without Triton every operator file still imports: `jit` then leaves a kernel a plain function that nobody calls, because
`_registry.use_triton` never chooses it.
"""

from ._versions import require_triton

TRITON_VERSION: str | None = None
INTERPRETED: bool = False  # TRITON_INTERPRET=1 when Triton was imported: kernels run on CPU tensors

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Stands for `triton` and `tl` where neither is installed, as far as the definition of a kernel needs them."""

        constexpr = object

        @staticmethod
        def jit(kernel):
            return kernel

    triton = tl = _Absent()
else:
    TRITON_VERSION = triton.__version__
    require_triton(TRITON_VERSION)
    INTERPRETED = bool(triton.knobs.runtime.interpret)

__all__ = ["INTERPRETED", "TRITON_VERSION", "tl", "triton"]
