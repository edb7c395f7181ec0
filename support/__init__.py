"""What serves the method: options, run folders, weights on disk. Nothing here is the algorithm."""
