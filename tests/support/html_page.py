"""Read a page as a parser does."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Check that tags nest; collect text, tags and what they refer to."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.texts, self.references = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.references += [v for n, v in attributes if n in ("src", "href", "xlink:href", "action", "style")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
