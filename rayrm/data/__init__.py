"""From a preference row to packed arrays: parse, tokenize, order, plan, pack."""
