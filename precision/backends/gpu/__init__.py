"""CUDA: memory, streams, graphs, timing, and the TensorRT engine on top of them."""
