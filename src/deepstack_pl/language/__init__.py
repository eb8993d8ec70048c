"""Text to tokens and back: templates, the shipped tokenizer, and any causal LM as a host of injections."""
