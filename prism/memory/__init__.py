"""Physical memory of one device: drivers, the slab pool, arenas and the ledger that accounts for all of it.

 slabs (pure accounting) <- pool (handles, one window of addresses) -> driver <- arena (a model's weights)

Drivers: `host` (a memory file), `cuda` (the CUDA driver API), `fake` (strict, for tests). Nothing here
knows what a model computes.
"""
