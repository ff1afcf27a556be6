"""Layer against layer: quantization, runtime and model errors, accumulated and alone."""
