"""A world small enough for two CPU cores: profiles, a simulated user and a policy, all made from one seeded grammar."""
