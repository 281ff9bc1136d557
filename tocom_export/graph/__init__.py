"""Writing a ViT's ONNX graph node by node."""
