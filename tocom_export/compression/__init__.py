"""Removing tokens, and the bank that compensates for it."""
