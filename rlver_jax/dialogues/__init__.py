"""A dialogue on the host: its log, how it reads, how it is verified, and playing one turn by turn."""
