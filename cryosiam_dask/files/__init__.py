"""Reading and writing tomograms, masks and predictions."""
