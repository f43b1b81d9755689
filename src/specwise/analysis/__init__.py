"""What it means: acceptance, latency, paired effects, the crossover."""
