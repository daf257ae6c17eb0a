"""What `helm test` runs: it writes a tiny model and preference data, and runs a DPOJob on them."""
