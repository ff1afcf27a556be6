"""Plans written in the language of a runtime: Q/DQ pairs, casts, integer kernels."""
