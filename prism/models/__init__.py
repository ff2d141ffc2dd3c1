"""Dense decoder models as small compositions of shared layers."""
