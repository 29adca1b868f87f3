"""Dialogues played turn by turn, where each side is a model on the device or one behind an endpoint."""
