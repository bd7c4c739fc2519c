"""One scheme, one file. No input or output happens here."""
