"""Searching schedules for a model and a machine, without labels."""
