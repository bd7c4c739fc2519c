"""`cleave gateway`: an OpenAI API on this machine, in front of a trusted worker that was verified."""
