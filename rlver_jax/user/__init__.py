"""The simulated user: its emotion, its prompts, and its turn on the device or at an endpoint."""
