"""From preference lines in storage to packs: validate, tokenise, index, order, pack, collate.

``index`` reads each line once and writes token ids to a memory-mapped spill; ``order`` says by arithmetic which pairs
make up a global batch; ``packing`` groups them under a token budget and deals the groups to ranks; ``collate`` builds
the pack.
"""
