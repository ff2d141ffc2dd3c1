"""A simulator: the shipped policies over a virtual clock and the cost model of a profile."""
