"""The layers of a network that ``freeze`` made: BatchNorm folded, weights prepared once, one kernel a layer."""
