"""The KL in a training: its schedule, its own step, what it will do and what it did."""
