"""What `helm test` runs: a tiny model and preferences, made here, and a DPOJob that aligns the one with the other."""
