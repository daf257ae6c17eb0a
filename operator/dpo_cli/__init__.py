"""The `dpo` command: validates manifests, runs them on this machine and draws their reports. Light: no torch."""
