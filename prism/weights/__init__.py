"""Model weights on their way from a checkpoint to a device.

 checkpoint -> packer (own process) -> memory file in the store (agent) -> client, link (worker) -> slabs
                                                                         '-> registrations (of a GPU's worker)

The layout says where each tensor lies; it is the same in the memory file and in the arena.
"""
