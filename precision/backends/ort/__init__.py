"""onnxruntime as a backend."""
