"""`slw-train`, and `python -m train`."""

from pipeline.__main__ import call


def main() -> None:
    """Call `slw-train`."""
    call("train.cli")


if __name__ == "__main__":
    main()
