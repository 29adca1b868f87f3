"""Profiles of simulated users: schema, dataset builder, and the reader that training resumes."""
