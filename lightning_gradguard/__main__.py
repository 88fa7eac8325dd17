"""`python -m lightning_gradguard`: the same as `lightning-gradguard`."""

from lightning_gradguard.cli.main import main

if __name__ == "__main__":
    main()
