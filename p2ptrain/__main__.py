"""`python -m p2ptrain`, for where the console script is not on the path."""

from p2ptrain.cli.main import run

if __name__ == "__main__":
    run()
