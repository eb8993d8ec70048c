"""Pixels to tokens: views, towers and the encoder, a host of injections."""
