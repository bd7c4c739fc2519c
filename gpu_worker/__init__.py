"""The untrusted worker: a fast calculator over public weights. It knows no scheme, no key and no text."""
