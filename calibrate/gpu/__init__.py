"""Histograms made on a CUDA device, where the tensors are."""
