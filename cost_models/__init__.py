"""What things cost on a cluster, in seconds and bytes: pure functions of numbers, no graph, no jax."""
