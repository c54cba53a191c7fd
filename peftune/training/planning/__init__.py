"""What a run will need, before any weight is loaded: memory of a rank, time of a step, what fits."""
