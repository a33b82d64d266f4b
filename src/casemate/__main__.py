"""``python -m casemate``: the command line."""

from casemate.cli.main import main

if __name__ == "__main__":
    main()
