"""Rewriting a model so that it quantizes well and computes the same in FP32."""
