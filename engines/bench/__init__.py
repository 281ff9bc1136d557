"""How fast engines run."""
