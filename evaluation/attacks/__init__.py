"""Attacks on what the GPU worker saw. They are given a transcript and what the attacker is said to know, no more."""
