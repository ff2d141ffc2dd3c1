"""Measures what steps and loads cost on a device, with the worker's own classes: `prism profile`."""
