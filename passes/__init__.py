"""The middle end: from a Graph and a Cluster to a Plan, one pass a file, without jax.

Reading order: `ir/` (the data), `rules/` (what every operation may split), `propagate` (hints to
shardings), `decisions` and `strategies` (what is open and which answers exist), `reshard` and
`price` (what each answer costs), `solve/` (the choice), `search` (over meshes).
"""
