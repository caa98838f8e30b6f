"""From a checkpoint to answers: engines, hot swaps, mixed batches."""
