"""NeMo's and Megatron-Core's files: settings, tokenizer and where each tensor is. Nothing here needs torch."""
