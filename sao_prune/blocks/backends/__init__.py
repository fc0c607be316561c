"""How a block product is computed: by torch, by compiled C on a CPU, by Triton on a GPU."""
