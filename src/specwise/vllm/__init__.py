"""All knowledge of vLLM, and nowhere else: flags, servers, metrics, responses."""
