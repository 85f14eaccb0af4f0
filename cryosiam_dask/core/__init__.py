"""The basis of everything else: grids of blocks, executors, logs."""
