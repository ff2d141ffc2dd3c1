"""Model weights on their way from a checkpoint to a device.

 checkpoint -> packer (own process) -> memory file in the store (agent) -> client, loader (worker) -> arena

The layout says where each tensor lies; it is the same in the memory file and in the arena.
"""
