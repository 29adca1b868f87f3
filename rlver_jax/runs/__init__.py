"""What a run leaves behind: dialogue logs, their rendering, and their exchange with SAGE's format."""
