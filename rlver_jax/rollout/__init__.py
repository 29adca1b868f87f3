"""Whole dialogues as one XLA program: the sampler, the policy's turn, rewards, and the agents that play."""
