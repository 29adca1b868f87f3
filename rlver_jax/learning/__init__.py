"""Learning from dialogues: packed batches, advantages, losses and the update."""
