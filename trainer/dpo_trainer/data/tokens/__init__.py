"""From records to token ids: the ``tokenizer``, the ``chat`` template, and in ``encode`` the rules for BOS and EOS."""
