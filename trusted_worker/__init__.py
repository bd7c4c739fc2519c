"""The trusted computing base: the only process that sees the conversation in clear. numpy, no torch."""
