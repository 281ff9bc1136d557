"""Variants that are switched and refitted while they serve."""
