"""`python -m gateway` is `aap`."""

from gateway.cli import main

if __name__ == "__main__":
    main()
