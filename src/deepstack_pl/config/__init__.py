"""The typed tree and its strict load: with cli, the only rooms that know Hydra."""
