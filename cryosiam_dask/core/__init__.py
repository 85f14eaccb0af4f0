"""What everything else stands on: grids of blocks, executors, logs."""
