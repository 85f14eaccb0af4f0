"""A collection's way through the stages: plan, ledger, workers, progress."""
