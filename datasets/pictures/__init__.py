"""Pictures: what is on disk, how it is read, and what becomes of it on the way to a model."""
