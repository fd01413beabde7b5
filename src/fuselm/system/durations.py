"""Write durations for people, in one way on screens and on pages."""


def format_duration(seconds: float, *, decimals: int = 1) -> str:
    """Return a duration in its two largest units, such as `2 h 05 min`, `7 min 00 s` or `3.5 s`.

    Below a minute, seconds have as many decimals as `decimals` says.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.{decimals}f} s"
