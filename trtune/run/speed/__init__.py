"""How fast the models of a run are, and which of them is the one to deploy for it."""
