"""Before a run: what its steps need, calculated, against what the cluster has. What can never be scheduled is refused at once."""
