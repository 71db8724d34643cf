"""The paper's experiments, and those that it leaves to future work, at sizes from minutes to weeks: one small file each, on one runner."""
