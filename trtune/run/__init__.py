"""A run: stages over one workspace, from a config to engines and a report."""
