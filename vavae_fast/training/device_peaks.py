"""What GPUs could do: peak dense bf16 FLOP/s, the denominator of MFU (model FLOPs utilisation, Chowdhery et al. 2022, appendix B)."""

import re

# Name as torch.cuda.get_device_name gives it -> tensor-core peak, bf16 with fp32 accumulation, without sparsity, from the vendors'
# data sheets (NVIDIA's print the sparse number, twice this). A laptop's or a MIG slice's name fits none: its peak is another.
_PEAKS = (
    (r"NVIDIA B200", 2250e12),
    (r"NVIDIA GB200", 2500e12),
    (r"NVIDIA H[12]00 NVL", 835.5e12),
    (r"NVIDIA H[18]00 PCIe", 756.5e12),
    (r"NVIDIA (H200|GH200 .*|H[18]00( 80GB HBM3)?)", 989.5e12),
    (r"(NVIDIA )?A[18]00[- ].*[48]0GB.*", 312e12),
    (r"NVIDIA A40", 149.7e12),
    (r"NVIDIA A30", 165e12),
    (r"NVIDIA A10", 125e12),
    (r"NVIDIA L40S", 362e12),
    (r"NVIDIA L40", 181e12),
    (r"NVIDIA L4", 121e12),
    (r"NVIDIA RTX 6000 Ada Generation", 364.2e12),
    (r"NVIDIA RTX A6000", 154.8e12),
    (r"NVIDIA GeForce RTX 5090", 209.5e12),
    (r"NVIDIA GeForce RTX 4090", 165.2e12),
    (r"NVIDIA GeForce RTX 3090", 71e12),
    (r"AMD Instinct MI3(00|25)X.*", 1307.4e12),
)


def peak_flops(name: str) -> float | None:
    """Peak bf16 FLOP/s of the device of that name; None when it is not in the table, or is a slice of one."""
    if re.search(r"\bMIG\b", name):
        return None
    return next((peak for pattern, peak in _PEAKS if re.fullmatch(pattern, name)), None)
