"""Who computes an op: the registries, the references and the tables that kernels read."""
