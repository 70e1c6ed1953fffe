"""Names of weights in other implementations, one module for each family of networks."""
