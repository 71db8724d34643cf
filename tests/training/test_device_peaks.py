"""Peaks of known devices by the names that drivers report; no guess for others."""

import pytest

from vavae_fast.training.device_peaks import peak_flops


@pytest.mark.parametrize("name, teraflops", [
    ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.5), ("NVIDIA H200 NVL", 835.5),
    ("NVIDIA GH200 480GB", 989.5), ("NVIDIA H800", 989.5), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312),
    ("NVIDIA A100 80GB PCIe", 312), ("A100-SXM4-40GB", 312), ("NVIDIA B200", 2250), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
    ("NVIDIA GeForce RTX 4090", 165.2), ("AMD Instinct MI300X", 1307.4),
])  # fmt: skip
def test_known_devices(name, teraflops):
    assert peak_flops(name) == teraflops * 1e12


@pytest.mark.parametrize("name", [
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
    "NVIDIA H20", "NVIDIA A100-SXM-64GB", "Tesla V100-SXM2-16GB", "cpu", "",
])  # fmt: skip
def test_slices_laptops_and_strangers_have_none(name):
    assert peak_flops(name) is None
