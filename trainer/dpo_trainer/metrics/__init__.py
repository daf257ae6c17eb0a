"""What a run tells the world: sums that become metrics, the sinks they go to, and the progress of the run."""
