"""Ways of running a block product, one a folder or file; each is plain functions on tensors."""
