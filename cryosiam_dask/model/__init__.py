"""The network: its checkpoints, its classes and its predictions for one block."""
