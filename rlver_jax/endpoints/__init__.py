"""Models behind an OpenAI-compatible HTTP endpoint: asking them, and keeping what they answered."""
