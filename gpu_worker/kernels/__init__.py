"""Ring products z.W^T modulo 2^32: the same bits on every device."""
