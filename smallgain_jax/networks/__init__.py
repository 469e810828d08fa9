"""Networks as chains of matrices: layers, budgets for their gains, certificates."""
