"""From preference lines in storage to packs: validate, tokenise, index, order, pack, collate.

``index`` reads each line once and writes the token ids to memory-mapped files; ``order`` computes the pairs of each
global batch; ``packing`` groups them under a token budget and assigns the groups to ranks; ``collate`` builds the pack.
"""
