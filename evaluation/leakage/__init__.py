"""cleave-leakage: real transcripts of every scheme, attacked; a matrix of what was recovered; a gate for the build."""
