"""The parent of all processes of one machine: it starts and restarts them and owns packed weights."""
