"""The data that passes hand to one another: graphs, meshes, shardings, rules and plans."""
