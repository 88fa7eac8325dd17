"""Trials before step 1, on the first batch: of the network, and of its learning rate."""
