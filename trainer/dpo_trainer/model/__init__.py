"""The model: its configuration, its construction in Megatron-Core, and its forward pass over packs."""
