"""Files: safetensors in place, pickles, atomic writes, and the one JSON codec."""
