"""`dpo convert`: a model from one format into another, tensor by tensor, in one process and without a GPU."""
