"""`python -m ear`: the command `ear`."""

from ear.commands.cli import main

if __name__ == "__main__":
    main(prog_name="ear")
