"""What things cost on a cluster, in seconds and bytes: pure functions of numbers, without jax.

Reading order: units, cluster_file, cluster (the hardware), topology (mesh axes on its wires),
collectives and roofline (seconds).
"""
