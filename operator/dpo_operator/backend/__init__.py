"""The kinds of children. ``pytorchjob`` is the only one; ``pod`` builds what any kind would run."""
