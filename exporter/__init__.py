"""Checkpoint to graphs: loading, the model, reparameterization, bundles and the command line."""
