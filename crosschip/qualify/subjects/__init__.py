"""What is examined: a recipe, a model directory or a callable, as a workload that can be run."""
