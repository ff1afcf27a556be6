"""Histograms made on a processor: sessions that hand out inner tensors, and what counts them."""
