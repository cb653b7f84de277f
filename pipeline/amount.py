"""A count and its noun, for messages: "1 record", "2,000 records"."""


def amount(count: int, noun: str) -> str:
    """1, "record" -> "1 record"; 2000 -> "2,000 records"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
