"""`python -m tersor.cli`, which torchrun starts."""

from tersor.cli.main import main

if __name__ == "__main__":
    main()
