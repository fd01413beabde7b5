"""What another library's exception says, in one line of ours."""


def first_line(error: BaseException) -> str:
    """Its type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
