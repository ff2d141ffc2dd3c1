"""Attention over paged KV and the fused layers around it, behind one interface: see kernels.py."""
