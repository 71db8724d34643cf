"""Fused operators for diffusion transformers and their tokenizers. Needs torch; Triton is imported lazily."""
