"""The client: tokenizer, chat, attestation policy. It trusts what its policy verifies, and nothing else."""
