"""What is on disk: tomograms, masks and predictions, read and written."""
