"""Trained models answer: on the terminal, over HTTP and on a page."""
