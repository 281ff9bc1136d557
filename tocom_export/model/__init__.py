"""What a Vision Transformer is, as data, and where descriptions of one come from."""
