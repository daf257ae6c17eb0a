"""From pairs to packs: ``order`` computes the pairs of each global batch.

``packing`` groups them under a token budget and assigns the groups to ranks; ``collate`` builds the pack of a group.
"""
