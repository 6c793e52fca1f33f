"""Target `onnx`: a graph for ONNX Runtime, in its own fast operators or in standard ones."""
