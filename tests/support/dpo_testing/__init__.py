"""Test code shared by the whole tree."""
