"""ONNX export and its runtime. Nothing is here yet."""
