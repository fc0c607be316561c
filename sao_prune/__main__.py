"""``python -m sao_prune``, for ``torchrun -m sao_prune`` as well."""

from .cli import main

if __name__ == "__main__":
    main()
