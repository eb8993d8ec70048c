"""Receipts and records, as figures and TensorBoard pages. Reads what the model returns, patches nothing."""
