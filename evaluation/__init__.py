"""Measurements and attacks: they see transcripts and public interfaces, never internals."""
