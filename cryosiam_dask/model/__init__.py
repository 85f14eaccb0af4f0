"""The network: checkpoints, classes, and the prediction of one block."""
