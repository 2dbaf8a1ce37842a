"""Fit: quantization-aware fitting of a checkpoint to one target's number formats."""
