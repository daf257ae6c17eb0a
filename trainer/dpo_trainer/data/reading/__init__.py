"""From files to records: ``rows`` reads JSON lines, ``tables`` Parquet and Arrow, and only the columns needed.

``records`` makes a record of a row, ``ranked`` several of a row with more than two responses; ``keys`` finds their
values in a row.
"""
