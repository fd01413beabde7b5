"""Name the styles of the style sheet in which pages draw sources."""

SOURCE_STYLES = 6  # colours of sources in the style sheet; more sources begin again


def style_source(number: int) -> str:
    """Return the style of a page's source, by its number from 0."""
    return f"source-{number % SOURCE_STYLES}"
