"""The Lightning floor: module, datamodule, optimiser groups, guards."""
