"""Prompts to activations: run a FLUX pipeline, keep what its blocks computed in a Zarr store."""
