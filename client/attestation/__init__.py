"""Evidence in, VerifiedPeer out. Nothing can be sent without one."""
