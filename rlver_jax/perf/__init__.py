"""What `bench` measures: one module a suite."""
