"""The `dpo` command: validates manifests, runs them on this machine and draws their reports. Never imports torch."""
