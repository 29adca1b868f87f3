"""Runs and evaluations as one page that is read in a browser, without a network."""
