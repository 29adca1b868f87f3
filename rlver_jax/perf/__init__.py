"""How fast and how large: what `plan` compiles and predicts, and what `bench` measures, one module a suite."""
