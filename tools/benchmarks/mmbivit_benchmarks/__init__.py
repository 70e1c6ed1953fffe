"""Benchmarks and the soak, whose modules lie beside their tools."""
