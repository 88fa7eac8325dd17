"""The largest stable learning rate before step 1, compared with a grid search."""
