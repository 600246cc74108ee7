"""A transformers model without its weights: what each weight is made of, when it is used, and putting it in place."""
