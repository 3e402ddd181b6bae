"""What replicator does per second, beside its peers, measured in the same run."""
