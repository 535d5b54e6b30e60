"""`python -m jaxdict` is `jaxdict`."""

from jaxdict.cli import main

if __name__ == "__main__":
    main()
