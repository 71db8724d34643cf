"""The paper's own numbers: Yao et al. 2025, arXiv 2501.01423, ImageNet 256 x 256. Nothing here was measured by this package."""

# Table 1, "Performance of LightningDiT": FID-50k without guidance, 80 epochs, in the order of the ladder.
TABLE_1 = {
    "DiT": 19.50,
    "+ rectified flow": 17.20,
    "+ batch x4, lr x2": 16.59,
    "+ AdamW beta2 0.95": 16.61,
    "+ logit-normal t": 13.99,
    "+ velocity direction loss": 12.52,
    "+ SwiGLU": 10.10,
    "+ RMSNorm": 9.25,
    "+ rotary positions": 7.13,
    "+ patch 1, VA-VAE": 4.29,
}

# Table 2, "VF loss improves generation performance": rFID, PSNR, LPIPS, SSIM; FID-10K of LightningDiT-B, -L, -XL.
RECONSTRUCTION = ("rFID", "PSNR", "LPIPS", "SSIM")
TABLE_2 = {
    (16, None): (0.49, 26.10, 0.132, 0.72, 16.24, 9.49, 8.28),
    (16, "mae"): (0.51, 26.01, 0.137, 0.71, 16.86, 10.93, 9.19),
    (16, "dinov2"): (0.55, 25.29, 0.147, 0.69, 15.79, 10.02, 8.71),
    (32, None): (0.26, 28.59, 0.089, 0.80, 22.62, 12.86, 10.92),
    (32, "mae"): (0.28, 28.33, 0.091, 0.80, 19.89, 11.51, 9.92),
    (32, "dinov2"): (0.28, 27.96, 0.096, 0.79, 15.82, 9.82, 8.22),
    (64, None): (0.17, 31.03, 0.055, 0.88, 36.83, 20.73, 17.24),
    (64, "mae"): (0.15, 31.03, 0.054, 0.87, 23.58, 14.40, 11.69),
    (64, "dinov2"): (0.14, 30.71, 0.055, 0.87, 24.00, 14.95, 11.98),
}

# Table 3, "System-level performance": FID, sFID, IS, precision, recall; by preset, without and with guidance.
TABLE_3 = {
    ("paper-64ep", False): (5.14, 4.22, 130.2, 0.76, 0.62),
    ("paper-64ep", True): (2.11, 4.16, 252.3, 0.81, 0.58),
    ("paper-800ep", False): (2.17, 4.36, 205.6, 0.77, 0.65),
    ("paper-800ep", True): (1.35, 4.15, 295.3, 0.79, 0.65),
}

# Table 4, "Ablation on foundation models", f16d32, LightningDiT-B: rFID, PSNR, LPIPS, SSIM, gFID.
TABLE_4 = {
    None: (0.26, 28.59, 0.089, 0.80, 22.62),
    "dinov2": (0.28, 27.96, 0.096, 0.79, 15.82),
    "mae": (0.28, 28.33, 0.091, 0.80, 19.89),
    "sam": (0.26, 28.31, 0.091, 0.80, 19.80),
    "clip": (0.33, 28.39, 0.091, 0.80, 18.93),
}

# Table 5, "Ablation study of VF loss formulations", f16d32, DINOv2, LightningDiT-B: rFID, PSNR, LPIPS, SSIM, gFID.
TABLE_5 = {
    "none": (0.26, 28.59, 0.089, 0.80, 22.62),
    "full": (0.28, 27.96, 0.096, 0.79, 15.82),
    "without mcos": (0.27, 28.52, 0.090, 0.80, 21.87),
    "without mdms": (0.27, 28.24, 0.090, 0.80, 17.74),
    "without margins": (0.27, 28.07, 0.093, 0.79, 17.77),
}

# Table 6, "Relationship between uniformity and generative performance": density std/mean, Gini, normalised entropy, gFID.
TABLE_6 = {
    (32, None): (0.263, 0.145, 0.995, 22.62),
    (32, "mae"): (0.193, 0.101, 0.997, 19.89),
    (32, "dinov2"): (0.178, 0.096, 0.998, 15.82),
    (64, None): (0.296, 0.166, 0.994, 36.83),
    (64, "mae"): (0.256, 0.143, 0.995, 23.58),
    (64, "dinov2"): (0.251, 0.141, 0.996, 24.00),
}

# Figure 4 (a), (b): how much sooner LightningDiT-B with DINOv2 alignment reaches the FID that it has without after 160 epochs.
FIGURE_4_SPEED_UP = {32: 2.54, 64: 2.76}
