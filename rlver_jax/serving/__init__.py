"""A policy behind a protocol, and at a terminal: batching, an OpenAI-compatible server, one conversation."""
