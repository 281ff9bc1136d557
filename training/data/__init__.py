"""Labelled images, for training and for evaluation."""
