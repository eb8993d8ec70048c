"""The published code's own format: its configurations, its words for plans, its names of tensors, its folders."""
