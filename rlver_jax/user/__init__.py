"""The simulated user: its emotion, its prompts, and the two ways of running it."""
