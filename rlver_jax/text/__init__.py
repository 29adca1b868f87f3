"""Text as tokens: tokenizers, chat segments, and byte automata over token streams."""
