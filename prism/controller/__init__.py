"""Decides which model lives on which device, tells gateways, and serves the admin endpoints."""
