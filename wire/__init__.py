"""What the client, the trusted worker and the GPU worker must agree on, byte for byte. Imports no role."""
