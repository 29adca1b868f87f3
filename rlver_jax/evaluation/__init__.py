"""Finished dialogues judged: logs scored again, other users' appraisals of them, and measures beyond the emotion."""
