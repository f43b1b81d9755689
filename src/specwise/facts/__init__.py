"""What is known before anything runs: checkpoints, hardware, the bundled pair, publications."""
