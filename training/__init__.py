"""PyTorch: the compressed model, training its bank, evaluating. Needs the ``torch`` extra."""
