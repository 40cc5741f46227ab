"""``python -m quire``: the command ``quire``, where its script is not on the path."""

from quire.cli.app import main

if __name__ == "__main__":
    main()
