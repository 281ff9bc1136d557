"""Accuracy over variants: measuring it, and what is made of the figures."""
