"""The traced graph of a network, and what stands in for parts of it when it is executed."""
