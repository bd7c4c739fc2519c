"""How the workers are started."""
