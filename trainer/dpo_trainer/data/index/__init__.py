"""The index of a set of pairs: ``build`` makes it in one pass, ``spill`` holds its files, ``tally`` its counts."""
