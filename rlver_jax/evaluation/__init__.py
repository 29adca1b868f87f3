"""Held-out profiles played and scored, and finished dialogues judged: judges, agreement, further measures."""
