"""What operators ask and do: snapshot, explanation of a job, health, prune, verify."""
