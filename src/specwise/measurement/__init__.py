"""What happened: prompts, arrivals, load, the study and its folder."""
