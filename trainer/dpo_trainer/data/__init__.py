"""From preference data in storage to packs: read, validate, tokenise, index, order, pack, collate.

``rows`` and ``tables`` read files; ``records`` and ``ranked`` make records of a row; ``index`` reads each row once and
writes the token ids to memory-mapped files; ``order`` computes the pairs of each
global batch; ``packing`` groups them under a token budget and assigns the groups to ranks; ``collate`` builds the pack.
"""
