"""What can be said without a server: memory, pairing, advice."""
