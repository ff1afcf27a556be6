"""Runtimes that a lowered model can run on."""
