"""Sweeps over meta-training and over new runs, on Ray Tune."""
