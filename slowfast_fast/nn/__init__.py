"""The blocks of the network. ``fused.py`` decides at every forward which of their layers run as one op."""
