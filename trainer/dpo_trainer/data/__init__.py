"""From preference data in storage to packs.

``reading`` makes records of rows, ``tokens`` token ids of records; ``index`` does both once for each row and writes the
token ids to memory-mapped files; ``packs`` chooses the pairs of each global batch and builds each rank's packs.
``problems`` are the reasons for which a row is not used.
"""
