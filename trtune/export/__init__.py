"""Exports: a run as the files that trtexec, DeepStream, Triton, onnxruntime or Polygraphy read."""
