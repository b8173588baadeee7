"""Quantized models whose values are chosen by what the model reads, from text."""

from infer.calibrate.run import calibrate, calibrated

__all__ = ["calibrate", "calibrated"]
