"""Which implementation of an operator runs. The one place that knows which operators have a Triton kernel."""

IMPLEMENTATIONS = ("auto", "triton", "torch")


def use_triton(op: str, impl: str) -> bool:
    """Whether operator `op` runs its Triton kernel; "torch" and, without a kernel, "auto" run the reference.

    Raises ValueError for an unknown `impl`, and for "triton" where the operator has no Triton kernel.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "triton":
        raise ValueError(f"{op}: this operator has no Triton kernel yet; use impl='auto' or impl='torch'")
    return False
